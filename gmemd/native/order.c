#include "order.h"

#include <errno.h>
#include <stdlib.h>

enum { FIRST_ROOM = 1024 };

struct gm_order *gm_order_new(struct gm_memory *m, struct gm_problem *ret)
{
    struct gm_order *o = calloc(1, sizeof *o + m->count * sizeof o->seen[0]);

    for (unsigned i = 0; o && i < m->count; i++) {
        o->memory = m;
        o->regions = m->count;
        o->seen[i] = calloc(gm_bitmap_words(m->region[i].pages), sizeof *o->seen[i]);
        if (!o->seen[i]) {
            gm_order_free(o);
            o = NULL;
        }
    }
    if (!o)
        gm_blame(ret, GM_KERNEL, ENOMEM, "order");
    return o;
}

void gm_order_free(struct gm_order *o)
{
    if (!o)
        return;
    for (unsigned i = 0; i < o->regions; i++)
        free((void *)o->seen[i]);
    free(o->run);
    free(o);
}

void gm_order_counters(const struct gm_order *o, struct gm_order_counters *out)
{
    *out = o->n;
}

static int make_room(struct gm_order *o, struct gm_problem *ret)
{
    uint64_t room = o->room ? 2 * o->room : FIRST_ROOM;
    struct gm_order_run *run;

    if (o->n.runs < o->room)
        return 0;
    run = realloc(o->run, room * sizeof *run);
    if (!run)
        return gm_blame(ret, GM_KERNEL, ENOMEM, "order of %llu runs", (unsigned long long)room);
    o->run = run;
    o->room = room;
    return 0;
}

static int add_page(struct gm_order *o, const struct gm_region *r, uint64_t page, struct gm_problem *ret)
{
    struct gm_order_run *last = o->n.runs ? &o->run[o->n.runs - 1] : NULL;
    bool follows = last && last->region == r->index && last->first + last->count == page && last->count < UINT32_MAX;

    if (gm_bitmap_test(o->seen[r->index], page))
        return 0;
    if (!follows && o->n.runs == GM_ORDER_RUNS) {
        o->n.left_out++;
        return 0;
    }
    if (!follows && make_room(o, ret) < 0)
        return -1;
    gm_bitmap_set(o->seen[r->index], page, 1);
    o->n.pages++;
    if (follows)
        last->count++;
    else
        o->run[o->n.runs++] = (struct gm_order_run){page, r->index, 1};
    return 0;
}

/* What is one page of the trace may be many of this memory, or a part of one. */
static int add_fault(struct gm_order *o, uint64_t gpa, uint32_t page_shift, struct gm_problem *ret)
{
    const struct gm_region *r = gm_memory_find_guest(o->memory, gpa);
    uint64_t page, end;

    if (!r) {
        o->n.outside++;
        return 0;
    }
    page = (gpa - r->gpa) >> r->page_shift;
    end = page + 1;
    if (page_shift > r->page_shift)
        end = page + (1ull << (page_shift - r->page_shift));
    for (; page < end && page < r->pages; page++)
        if (add_page(o, r, page, ret) < 0)
            return -1;
    return 0;
}

int gm_order_add(struct gm_order *o, const struct gm_trace_record *records, uint64_t count,
                 const struct gm_order_region *regions, struct gm_problem *ret)
{
    for (uint64_t i = 0; i < count; i++) {
        const struct gm_order_region *region = &regions[records[i].region];

        if (add_fault(o, region->gpa + (records[i].page << region->page_shift), region->page_shift, ret) < 0)
            return -1;
    }
    return 0;
}
