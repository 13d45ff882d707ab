#include "ahead.h"

#include <stddef.h>

/* The background may have brought some pages of a walk by itself; a fault this far on still belongs to it. */
enum { REACH = 64 };

static struct gm_walk *find(struct gm_ahead *a, uint32_t region, uint64_t page)
{
    struct gm_walk *oldest = &a->walk[0];

    for (size_t i = 0; i < GM_WALKS; i++) {
        struct gm_walk *walk = &a->walk[i];

        if (walk->used && walk->region == region && page - walk->next < REACH)
            return walk;
        if (walk->used < oldest->used)
            oldest = walk;
    }
    *oldest = (struct gm_walk){.region = region};
    return oldest;
}

uint32_t gm_ahead_fault(struct gm_ahead *a, uint32_t region, uint64_t page)
{
    struct gm_walk *walk;

    if (!a->most)
        return 0;
    walk = find(a, region, page);
    if (walk->used)
        walk->window = walk->window ? 2 * walk->window : 1;
    if (walk->window > a->most)
        walk->window = a->most;
    walk->used = ++a->now;
    walk->next = page + 1 + walk->window;
    return walk->window;
}
