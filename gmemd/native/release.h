/* Which parts of guest memory userfaultfd still guards. */
#ifndef GM_RELEASE_H
#define GM_RELEASE_H

#include "memory.h"

/* What is let go at a time, in pages of the region: a power of two. */
uint64_t gm_release_pages(const struct gm_memory *m, const struct gm_region *r);

/* Lets go of the pieces that [first, first + count) has a part in, and in which nothing is missing. Who waits there goes on. */
void gm_release(struct gm_memory *m, struct gm_region *r, uint64_t first, uint64_t count);

#endif
