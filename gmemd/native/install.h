/* Install: claim → populate → mark received → continue. The only place where guest memory is written. */
#ifndef GM_INSTALL_H
#define GM_INSTALL_H

#include "destination.h"

/* What a lane may install now of a frame: bit i stands for first + i. */
struct gm_install {
    struct gm_destination *destination;
    struct gm_region *region;
    struct gm_inflight *slot;
    unsigned lane;
    uint64_t first;
    unsigned count;
    uint64_t claimed;
    uint64_t left; /* what could not be taken out */
    bool hole; /* what was put in place are zeros */
    uint64_t began_ns; /* on the urgent lane, else 0 */
};

/* Announces the frame in the lane's slot and claims its missing pages. Fails while the frame before is unfinished. */
int gm_install_begin(struct gm_install *in, struct gm_destination *d, unsigned lane, struct gm_region *r,
                     uint64_t first, unsigned count, struct gm_problem *ret);

/* Around reading events and acting upon them. */
void gm_install_events_begin(struct gm_destination *d);
void gm_install_events_end(struct gm_destination *d);

/* Puts the content of the claimed pages into the memory file: `data` holds the whole frame, NULL stands for zeros. */
int gm_install_populate(struct gm_install *in, const unsigned char *data, struct gm_problem *ret);

/* Marks the claimed pages received, maps them, wakes who waits. */
void gm_install_finish(struct gm_install *in);

/* Gives the claims back: the content did not come, or could not be put in place. Returns whether the VMM took something of them out; whole
 * pages of that are received, and the pager wakes who waits for them. */
bool gm_install_give_up(struct gm_install *in);

/* Receives what is missing of at most 64 pages as a hole. Adds to *pages how many those were; they are still to be counted. */
int gm_install_hole(struct gm_destination *d, struct gm_region *r, uint64_t first, unsigned count, uint64_t *pages,
                    struct gm_problem *ret);

/* Counts received pages, and tells the event loop when nothing is missing any more. */
void gm_install_count(struct gm_destination *d, uint64_t pages);

/* Takes out what the VMM removed and could not be taken out before; tells if it still cannot. */
void gm_install_retry(struct gm_destination *d);

/* The VMM took pages out: those missing are received as zeros, those in flight will be. Between gm_install_events_begin() and _end(). */
void gm_install_removed(struct gm_destination *d, struct gm_region *r, uint64_t first, uint64_t count);

/* Answers a fault on a received page: maps it, and wakes. Returns 0, or -errno when it has to be tried again (-EAGAIN), or
 * cannot be done. */
int gm_install_continue(struct gm_destination *d, struct gm_region *r, uint64_t page);

#endif
