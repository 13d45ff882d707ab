/*
 * What each page had when it was put in place: a CRC-32C a page, made before the guest could change it, and compared at the end with
 * what the source has.
 */
#ifndef GM_DIGEST_H
#define GM_DIGEST_H

#include "memory.h"
#include "problem.h"

#include <stdint.h>

/* python */
struct gm_verdict {
    uint64_t verified, left_out, mismatches;
    uint64_t region, page; /* of the first mismatch */
};

/*
 * From now on a digest is kept of every page that is put in place; one that was before is left out. `fd` is the memfd in which a
 * predecessor kept them, -1 for a new one; it stays the caller's. Does nothing when they are kept already.
 */
int gm_digest_keep(struct gm_memory *m, int fd, struct gm_problem *ret);
/* The memfd that a successor needs, or -1. */
int gm_digest_fd(const struct gm_memory *m);

/* Digests of what the memory files have now. */
int gm_digest_read(const struct gm_memory *m, unsigned region, uint64_t first, unsigned count, uint32_t *out,
                   struct gm_problem *ret);

/* Adds to `total` how those of the source compare with those that are kept. */
void gm_digest_compare(const struct gm_memory *m, unsigned region, uint64_t first, unsigned count,
                       const uint32_t *theirs, struct gm_verdict *total);
/* end python */

/* Of some pages from `first` on. */
struct gm_digest_frame {
    struct gm_digests *kept; /* NULL when none are */
    uint32_t of[GM_FRAME_PAGES];
};

/* Makes those of the pages from `first` on that `mask` names: from their file or, of a hole, without looking there. */
void gm_digest_make(struct gm_digest_frame *frame, const struct gm_memory *m, const struct gm_region *r, uint64_t first,
                    uint64_t mask, bool hole);
/* Keeps them. */
void gm_digest_put(const struct gm_digest_frame *frame, const struct gm_region *r, uint64_t first, uint64_t mask);
/* These pages never had the source's content. */
void gm_digest_leave_out(const struct gm_memory *m, const struct gm_region *r, uint64_t first, uint64_t mask);

void gm_digest_free(struct gm_digests *kept);

#endif
