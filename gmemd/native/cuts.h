/*
 * Parts of huge pages that the VMM took out while these were missing. The kernel clears the part of a page that is there, and does nothing
 * for one that is not; so the part is remembered, in the state, and cleared before the page is seen.
 */
#ifndef GM_CUTS_H
#define GM_CUTS_H

#include "memory.h"

/* Whether every cut in the state lies within its region. */
bool gm_cuts_fit(const struct gm_state *state);

/* Remembers what [start, end), addresses of the VMM, takes of pages that are not received without taking them whole. Fails if that is too
 * much. One thread at a time. */
int gm_cuts_note(struct gm_memory *m, const struct gm_region *r, uint64_t start, uint64_t end, struct gm_problem *ret);

/* Whether something of a page was taken out before it came. */
bool gm_cuts_any(const struct gm_memory *m, const struct gm_region *r, uint64_t page);

/* Clears that. */
int gm_cuts_clear(const struct gm_memory *m, struct gm_region *r, uint64_t page, struct gm_problem *ret);

#endif
