/* The receiving end of a page lane: bytes of the source in, installed pages out. */
#ifndef GM_LANE_H
#define GM_LANE_H

#include "destination.h"
#include "frame.h"
#include "problem.h"
#include "tls.h"
#include "stream.h"

#include <stdbool.h>
#include <stdint.h>

/* python */
enum gm_lane_state {
    GM_LANE_IDLE, /* all that had come is dealt with: wait until the socket is readable */
    GM_LANE_BUSY, /* the budget is used up */
};

struct gm_lane;

/* `socket` stays the caller's, and is non-blocking, and so does `tls`, the session on it, or NULL. Lane 0 is the urgent one. */
struct gm_lane *gm_lane_new(struct gm_destination *d, unsigned lane, int socket, struct gm_tls *tls, int checksum,
                            struct gm_problem *ret);
void gm_lane_free(struct gm_lane *lane);
/* Installs what comes until nothing more is there or `budget_us` is over: a gm_lane_state, or -1 when the lane ended. */
int gm_lane_receive(struct gm_lane *lane, uint32_t budget_us, struct gm_problem *ret);
/* Whether the last gm_lane_receive() ended at a frame that the host has no room for: the next one tries it again. */
int gm_lane_held(const struct gm_lane *lane);
/* Sends a beat, unless there is no room: much is on its way then. For a background lane. */
void gm_lane_beat(struct gm_lane *lane);
/* When something last came, CLOCK_MONOTONIC. */
uint64_t gm_lane_heard_ns(const struct gm_lane *lane);
/* end python */

struct gm_lane {
    struct gm_destination *destination;
    struct gm_stream stream;
    unsigned index;
    int checksum;
    unsigned char *buffer;
    size_t capacity, start, end; /* [start, end) has come and is not dealt with */
    struct gm_frame frame;       /* the header at `start`, once it has been checked */
    int has_frame;
    bool direct;   /* some region takes its pages straight from the socket, so nothing is read ahead */
    bool looked;   /* for the payload of this frame, and not all of it was there */
    bool buffered; /* this frame takes the way through the buffer all the same */
    bool held;     /* it found no room */
    unsigned damaged;
    uint64_t faults; /* that there were when the latest frame was put in place */
};

/* Installs the frame whose header has been read, from the socket into the alias. Returns 1, 0 when not all of the payload has
 * come, or -1 when the lane ended. May decide for the buffer, and then has done nothing. */
int gm_lane_install_direct(struct gm_lane *lane, struct gm_problem *ret);

/* For both ways: the frame was damaged; ask for its pages once more, or end the lane. */
int gm_lane_ask_again(struct gm_lane *lane, struct gm_problem *ret);
void gm_lane_count(const struct gm_lane *lane, uint64_t claimed, uint64_t bytes);

#endif
