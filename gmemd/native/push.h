/* A background lane at the source: sends what nobody has asked for yet, frame by frame, until all is taken. */
#ifndef GM_PUSH_H
#define GM_PUSH_H

#include "problem.h"
#include "source.h"
#include "tls.h"

#include <stdint.h>

/* python */
enum gm_push_state {
    GM_PUSH_FULL, /* wait until the socket is writable */
    GM_PUSH_BUSY, /* the budget is used up */
    GM_PUSH_EARLY, /* the rate allows no more now: wait gm_source_pause_us() */
    GM_PUSH_DONE, /* every page is taken by some lane, and what this one took has gone */
};

struct gm_push;

/* `socket` stays the caller's, and is non-blocking, and so does `tls`, the session on it, or NULL. `lane` is 1 or more. */
struct gm_push *gm_push_new(struct gm_source *s, unsigned lane, int socket, struct gm_tls *tls, int checksum,
                            struct gm_problem *ret);
void gm_push_free(struct gm_push *p);
/* A gm_push_state, or -1 when the lane ended or a page cannot be read. */
int gm_push_run(struct gm_push *p, uint32_t budget_us, struct gm_problem *ret);
/* The same, with a beat first: for a lane that has nothing to say. */
int gm_push_beat(struct gm_push *p, struct gm_problem *ret);
/* Takes what the destination says on it, which is that it is alive: 1 if it said something, 0 if not, -1 when the lane ended. Another
 * thread may be in gm_push_run() meanwhile. */
int gm_push_hear(struct gm_push *p, struct gm_problem *ret);
/* end python */

#endif
