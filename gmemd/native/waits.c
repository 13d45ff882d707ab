#include "waits.h"

#include "cleanup.h"

#include <string.h>

void gm_waits_init(struct gm_waits *w)
{
    pthread_mutex_init(&w->lock, NULL);
    atomic_init(&w->count, 0);
}

void gm_waits_deinit(struct gm_waits *w)
{
    pthread_mutex_destroy(&w->lock);
}

bool gm_waits_add(struct gm_waits *w, const struct gm_wait *wait)
{
    GM_LOCKED(&w->lock);
    bool first = true;
    uint32_t n = w->count;

    for (uint32_t i = 0; i < n && first; i++)
        first = w->entry[i].page != wait->page || w->entry[i].region != wait->region;
    w->entry[n] = *wait;
    w->count = n + 1;
    return first;
}

bool gm_waits_take(struct gm_waits *w, uint32_t region, uint64_t first, uint64_t count, struct gm_wait *out)
{
    GM_LOCKED(&w->lock);

    for (uint32_t i = 0; i < w->count; i++) {
        struct gm_wait *wait = &w->entry[i];

        if (wait->region == region && wait->page - first < count) {
            *out = *wait;
            *wait = w->entry[--w->count];
            return true;
        }
    }
    return false;
}

bool gm_waits_within(struct gm_waits *w, uint32_t region, uint64_t first, uint64_t count)
{
    bool found = false;

    if (!gm_waits_any(w))
        return false;
    GM_LOCKED(&w->lock);
    for (uint32_t i = 0; i < w->count && !found; i++)
        found = w->entry[i].region == region && w->entry[i].page - first < count;
    return found;
}

unsigned gm_waits_list(struct gm_waits *w, struct gm_wait *out, unsigned most)
{
    GM_LOCKED(&w->lock);
    unsigned n = w->count < most ? w->count : most;

    memcpy(out, w->entry, n * sizeof *out);
    return n;
}
