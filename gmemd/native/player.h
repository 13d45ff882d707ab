/*
 * The guest's part in a replay: memory with content that a seed decides, and threads that touch its
 * pages as those of a trace did.
 *
 * A touch is timed from before the access until after it. What the page then holds is compared with
 * what it must, outside of that time. A write adds 1 to the page's last word, so that a page that
 * comes once more over a written one is found out.
 */
#ifndef GM_PLAYER_H
#define GM_PLAYER_H

#include "problem.h"
#include "trace.h"

#include <stdint.h>

/* python */
struct gm_player_region {
    uint64_t hva, pages; /* where it is mapped here */
    uint32_t page_shift;
};

/* What became of an access. `waited`: the kernel put the thread to sleep for the page. */
struct gm_touch {
    uint64_t began_ns, took_ns, waited;
};

struct gm_player;

struct gm_player *gm_player_new(const struct gm_player_region *regions, uint32_t count,
                                uint64_t seed, struct gm_problem *ret);
void gm_player_free(struct gm_player *p);

/* Gives an empty region its content, through a mapping at `at`; zero pages stay holes. */
void gm_player_fill(const struct gm_player *p, uint32_t region, uint64_t at);

/*
 * Touches what the `n` accesses of one thread say, in their order, into `out`. `start_ns` of
 * CLOCK_MONOTONIC stands for the trace's `origin_ns`. An access is due so long after the one before
 * was due as it was in the trace, times `pace` (0: at once), but not before that one is complete.
 * Returns how many were done, fewer if stopped, or -1 for a page with wrong content.
 */
int64_t gm_player_run(struct gm_player *p, const struct gm_trace_record *accesses, uint64_t n,
                      uint64_t origin_ns, uint64_t start_ns, double pace, struct gm_touch *out,
                      struct gm_problem *ret);

/* Ends all runs, but for threads that wait for a page. */
void gm_player_stop(struct gm_player *p);

/* After the runs: compares a region, what was written included. -1 for the first wrong page. */
int gm_player_check(const struct gm_player *p, uint32_t region, struct gm_problem *ret);
/* end python */

#endif
