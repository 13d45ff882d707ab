/* Which parts of guest memory userfaultfd still guards. */
#ifndef GM_RELEASE_H
#define GM_RELEASE_H

#include "memory.h"

#include <stdbool.h>

/* Lets go of the pieces that [first, first + count) has a part in, and in which nothing is missing. Who waits there goes on. Returns whether that
 * is all of them. */
bool gm_release(struct gm_memory *m, struct gm_region *r, uint64_t first, uint64_t count);

/* A piece that a lane was in. */
struct gm_trail_piece {
    unsigned region;
    uint64_t number;
    bool open; /* it was not let go of */
};

/* The latest two of a lane. */
struct gm_trail {
    struct gm_trail_piece here, before;
};

/* The same for a lane, which looks once more at a piece that it has left: its last pages may have come by the urgent lane. */
void gm_release_behind(struct gm_memory *m, struct gm_trail *trail, struct gm_region *r, uint64_t first, uint64_t count);

#endif
