#include "stages.h"

#include "clock.h"

void gm_stages_stamp(struct gm_stages *s, enum gm_stage stage, unsigned region, uint64_t page)
{
    uint64_t place = atomic_fetch_add_explicit(&s->next, 1, memory_order_relaxed) % GM_STAMPS;
    uint64_t what = (uint64_t)stage | (uint64_t)region << 8 | page << 24;

    /* No stamp is read while it is written. */
    atomic_store(&s->stamp[place].what, 0);
    atomic_store(&s->stamp[place].time_ns, gm_now_ns());
    atomic_store(&s->stamp[place].what, what);
}

unsigned gm_stages_read(struct gm_stages *s, struct gm_stamp *out, unsigned most)
{
    uint64_t next = atomic_load(&s->next), at = next > GM_STAMPS ? next - GM_STAMPS : 0;
    unsigned n = 0;

    for (; at < next && n < most; at++) {
        uint64_t what = atomic_load(&s->stamp[at % GM_STAMPS].what);

        out[n].time_ns = atomic_load(&s->stamp[at % GM_STAMPS].time_ns);
        out[n].what = what;
        n += what && what == atomic_load(&s->stamp[at % GM_STAMPS].what);
    }
    return n;
}
