#include "cuts.h"

#include "guard.h"

#include <errno.h>
#include <stdatomic.h>

enum { BASE_SHIFT = 12, BASE_PAGE = 1 << BASE_SHIFT };

/* Base pages, counted from the region's start, all of one huge page. As a word: count 10 bits, first 44 bits, region 10 bits; 0 is none. */
struct cut {
    uint64_t first;
    unsigned count, region;
};

_Static_assert(GM_MAX_REGIONS <= 1 << 10, "a cut has 10 bits for its region");
_Static_assert(GM_MAX_PAGE_SHIFT - BASE_SHIFT < 10, "a cut has 10 bits for its pages");

static uint64_t word_of(struct cut cut)
{
    return (uint64_t)cut.region << 54 | cut.first << 10 | cut.count;
}

static struct cut cut_of(uint64_t word)
{
    return (struct cut){word >> 10 & ((UINT64_C(1) << 44) - 1), (unsigned)(word & 1023), (unsigned)(word >> 54)};
}

static struct cut read_cut(const struct gm_state *state, unsigned i)
{
    return cut_of(atomic_load(&state->cut[i]));
}

bool gm_cuts_fit(const struct gm_state *state)
{
    for (unsigned i = 0; i < GM_CUTS; i++) {
        struct cut cut = read_cut(state, i);
        const struct gm_state_region *r;
        uint64_t most;

        if (!atomic_load(&state->cut[i]))
            continue;
        if (cut.region >= state->regions || cut.count == 0)
            return false;
        r = &state->region[cut.region];
        most = UINT64_C(1) << (r->page_shift - BASE_SHIFT);
        if (cut.first / most >= r->pages || cut.first % most + cut.count > most)
            return false;
    }
    return true;
}

static uint64_t page_of(const struct gm_region *r, struct cut cut)
{
    return cut.first >> (r->page_shift - BASE_SHIFT);
}

static bool is_of(const struct gm_region *r, struct cut cut, uint64_t page)
{
    return cut.count && cut.region == r->index && page_of(r, cut) == page;
}

/* Cuts that touch are one. */
static bool join(const struct gm_region *r, struct cut *into, struct cut other)
{
    uint64_t first = into->first < other.first ? into->first : other.first;
    uint64_t end = into->first + into->count, other_end = other.first + other.count;

    if (!is_of(r, other, page_of(r, *into)) || into->first > other_end || other.first > end)
        return false;
    *into = (struct cut){first, (unsigned)((end > other_end ? end : other_end) - first), into->region};
    return true;
}

static int note(struct gm_memory *m, const struct gm_region *r, struct cut cut, struct gm_problem *ret)
{
    unsigned at = GM_CUTS, unused = GM_CUTS;

    if (!cut.count || gm_bitmap_test(r->received, page_of(r, cut)))
        return 0;
    for (unsigned i = 0; i < GM_CUTS; i++) {
        struct cut there = read_cut(m->state, i);
        const struct gm_region *its = &m->region[there.region];

        /* What is cut out of a page that came meanwhile has been cleared. */
        if (!there.count || gm_bitmap_test(its->received, page_of(its, there)))
            unused = i;
        else if (join(r, &cut, there))
            at = i;
    }
    if (at == GM_CUTS)
        at = unused;
    if (at == GM_CUTS)
        return gm_blame(ret, GM_VMM, 0, "region %u: the VMM removes parts of huge pages, here of page %llu: it may come back, as %d others wait for their pages",
                        r->index, (unsigned long long)page_of(r, cut), GM_CUTS);
    atomic_store(&m->state->cut[at], word_of(cut));
    return 0;
}

int gm_cuts_note(struct gm_memory *m, const struct gm_region *r, uint64_t start, uint64_t end, struct gm_problem *ret)
{
    uint64_t region_end = r->hva + gm_bytes(r, r->pages), most = UINT64_C(1) << (r->page_shift - BASE_SHIFT);
    uint64_t first, last, head_end, tail;
    struct cut head, back;

    if (start < r->hva)
        start = r->hva;
    if (end > region_end)
        end = region_end;
    if (start >= end || most == 1)
        return 0;
    first = (start - r->hva) >> BASE_SHIFT;
    last = (end - r->hva) >> BASE_SHIFT;
    head_end = first % most ? (first / most + 1) * most : first;
    if (head_end > last)
        head_end = last;
    tail = last - last % most;
    if (tail < head_end)
        tail = last;
    head = (struct cut){first, (unsigned)(head_end - first), r->index};
    back = (struct cut){tail, (unsigned)(last - tail), r->index};
    return note(m, r, head, ret) < 0 || note(m, r, back, ret) < 0 ? -1 : 0;
}

bool gm_cuts_any(const struct gm_memory *m, const struct gm_region *r, uint64_t page)
{
    for (unsigned i = 0; i < GM_CUTS; i++)
        if (is_of(r, read_cut(m->state, i), page))
            return true;
    return false;
}

int gm_cuts_clear(const struct gm_memory *m, struct gm_region *r, uint64_t page, struct gm_problem *ret)
{
    static const unsigned char zeros[BASE_PAGE];
    int error = 0;

    if (gm_region_map_alias(r, ret) < 0)
        return -1;
    for (unsigned i = 0; i < GM_CUTS; i++) {
        struct cut cut = read_cut(m->state, i);

        for (unsigned at = 0; !error && is_of(r, cut, page) && at < cut.count; at++)
            error = gm_guarded_store(r->alias + ((cut.first + at) << BASE_SHIFT), zeros, BASE_PAGE);
    }
    if (error)
        return gm_blame(ret, GM_VMM, -error, "region %u: page %llu cannot be cleared where the VMM cut into it", r->index,
                        (unsigned long long)page);
    return 0;
}
