/*
 * The pager: the one thread that answers faults, for all migrations of the daemon.
 *
 *     vCPU touches a page → userfaultfd → gm_pager_run: drain, drop what is received or asked for → urgent lane → source
 *     source → urgent lane → gm_pager_run: claim, populate, mark, continue → vCPU runs
 */
#ifndef GM_PAGER_H
#define GM_PAGER_H

#include "destination.h"
#include "lane.h"
#include "problem.h"

#include <stdint.h>

/* python */
struct gm_pager;

/* Polls for at most `poll_us` before it sleeps, 0 for never. */
struct gm_pager *gm_pager_new(uint32_t poll_us, struct gm_problem *ret);
void gm_pager_free(struct gm_pager *p);

/* Runs until gm_pager_stop(). Call it in a thread of its own. */
int gm_pager_run(struct gm_pager *p, struct gm_problem *ret);
void gm_pager_stop(struct gm_pager *p);
/* How often it has looked for work and done all that it found. */
uint64_t gm_pager_turns(const struct gm_pager *p);
/* Has it do so once more. Does not wait for it: it may hang. */
void gm_pager_turn(struct gm_pager *p);

/* From when it is added until it is removed, the pager reads the destination's userfaultfds. */
int gm_pager_add(struct gm_pager *p, struct gm_destination *d, struct gm_problem *ret);
void gm_pager_remove(struct gm_pager *p, struct gm_destination *d);

/* Gives the destination its urgent lane, and asks on it for all that is waited for; NULL takes it away. */
int gm_pager_urgent(struct gm_pager *p, struct gm_destination *d, struct gm_lane *lane, struct gm_problem *ret);

/* Sends a beat on the urgent lane, if there is one. */
void gm_pager_beat(struct gm_pager *p, struct gm_destination *d);

/* Has the pager map what is in place, ask once more for all else that is waited for, and have the VMM ask for what it was not told. */
void gm_pager_ask(struct gm_pager *p, struct gm_destination *d);
/* end python */

#endif
