#include "source.h"

#include "cleanup.h"
#include "clock.h"
#include "memfile.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

struct gm_source *gm_source_new(struct gm_memory *m, struct gm_problem *ret)
{
    struct gm_source *s = calloc(1, sizeof *s);

    if (!s) {
        gm_blame(ret, GM_KERNEL, ENOMEM, "source");
        return NULL;
    }
    s->memory = m;
    s->from_start = true;
    pthread_mutex_init(&s->lock, NULL);
    return s;
}

void gm_source_free(struct gm_source *s)
{
    if (!s)
        return;
    pthread_mutex_destroy(&s->lock);
    gm_trace_free(s->asked);
    free(s);
}

struct gm_trace *gm_source_learn(struct gm_source *s, uint32_t records, struct gm_problem *ret)
{
    s->asked = gm_trace_new(records);
    if (!s->asked)
        gm_blame(ret, GM_KERNEL, ENOMEM, "trace of requests");
    return s->asked;
}

void gm_source_counters(const struct gm_source *s, struct gm_source_counters *out)
{
    *out = (struct gm_source_counters){
        .urgent_pages = s->n.urgent_pages,
        .ahead_pages = s->n.ahead_pages,
        .background_pages = s->n.background_pages,
        .zero_pages = s->n.zero_pages,
        .sent_bytes = s->n.sent_bytes,
    };
}

void gm_source_open(struct gm_source *s)
{
    atomic_store(&s->open, true);
}

void gm_source_restart(struct gm_source *s)
{
    GM_LOCKED(&s->lock);

    for (unsigned i = 0; i < s->memory->count; i++) {
        struct gm_region *r = &s->memory->region[i];

        for (size_t word = 0; word < gm_bitmap_words(r->pages); word++)
            atomic_store_explicit(&r->claimed[word], 0, memory_order_relaxed);
    }
    s->region = 0;
    s->page = 0;
    s->from_start = true;
    s->run = 0;
    s->into = 0;
}

void gm_source_follow(struct gm_source *s, const struct gm_order *order)
{
    GM_LOCKED(&s->lock);

    s->order = order;
    s->run = 0;
    s->into = 0;
}

void gm_source_skip(struct gm_source *s, unsigned region, uint64_t first, uint64_t count)
{
    gm_bitmap_set(s->memory->region[region].claimed, first, count);
}

void gm_source_set_rate(struct gm_source *s, uint64_t bytes_per_s)
{
    GM_LOCKED(&s->lock);

    s->rate = bytes_per_s;
    s->due_ns = 0;
}

uint64_t gm_source_pause_us(struct gm_source *s)
{
    GM_LOCKED(&s->lock);
    uint64_t now = gm_now_ns();

    return s->rate && s->due_ns > now ? (s->due_ns - now) / 1000 : 0;
}

void gm_source_set_giveway(struct gm_source *s, int giveway)
{
    s->insists = !giveway;
}

void gm_source_note_queue(struct gm_source *s, uint32_t queue_us)
{
    gm_giveway_queue(&s->giveway, queue_us);
}

uint64_t gm_source_lane_rate(struct gm_source *s)
{
    uint64_t rate = s->insists ? 0 : gm_giveway_rate(&s->giveway, gm_now_ns());
    unsigned lanes = atomic_load(&s->pushing);

    return lanes > 1 ? rate / lanes : rate;
}

/* A pause is not made up for later. */
static void pace(struct gm_source *s, uint64_t bytes)
{
    uint64_t now = gm_now_ns();

    if (s->rate)
        s->due_ns = (s->due_ns > now ? s->due_ns : now) + bytes * 1000000000 / s->rate;
}

unsigned gm_source_holes(struct gm_source *s, unsigned region, uint64_t *from, uint64_t *pairs, unsigned most)
{
    struct gm_region *r = &s->memory->region[region];
    uint64_t end = gm_file_offset(r, r->pages);
    unsigned n = 0;

    while (n < most && *from < r->pages) {
        uint64_t data[2];
        uint64_t hole = *from;

        /* A hole ends at the page in which data begins, and data ends with the page in which a hole begins. */
        if (gm_memfile_data(r->fd, gm_file_offset(r, *from), end, data)) {
            pairs[2 * n + 1] = ((data[0] - r->offset) >> r->page_shift) - hole;
            *from = (data[1] - r->offset + gm_bytes(r, 1) - 1) >> r->page_shift;
        } else {
            pairs[2 * n + 1] = r->pages - hole;
            *from = r->pages;
        }
        pairs[2 * n] = hole;
        if (!pairs[2 * n + 1])
            continue;
        gm_bitmap_set(r->claimed, hole, pairs[2 * n + 1]);
        atomic_fetch_add(&s->n.zero_pages, pairs[2 * n + 1]);
        n++;
    }
    return n;
}

void gm_source_go_to(struct gm_source *s, uint32_t region, uint64_t page)
{
    GM_LOCKED(&s->lock);

    s->region = region;
    s->page = page;
    s->from_start = false;
}

/* Takes the next pages of [*page, last) that nobody has, and moves *page behind them. */
static bool take_between(struct gm_source *s, struct gm_region *r, uint64_t *page, uint64_t last,
                         const struct gm_region **region, uint64_t *first, unsigned *count)
{
    while ((*page = gm_bitmap_find(r->claimed, *page, last, false)) < last) {
        uint64_t limit = *page + gm_frame_pages(r);
        uint64_t end = gm_bitmap_find(r->claimed, *page, limit < last ? limit : last, true);
        uint64_t mask = gm_bitmap_claim(r->claimed, *page, (unsigned)(end - *page));
        unsigned at = 0, run = gm_mask_run(mask, &at);

        if (!run)
            continue;
        /* The urgent lane may have taken some of them meanwhile: keep the first run, and come back for the rest. */
        gm_bitmap_give_back(r->claimed, *page, mask & ~gm_ones(at, run));
        *region = r;
        *first = *page + at;
        *count = run;
        *page = *first + run;
        pace(s, gm_bytes(r, run));
        return true;
    }
    return false;
}

static bool take_from_order(struct gm_source *s, const struct gm_region **region, uint64_t *first, unsigned *count)
{
    for (; s->order && s->run < s->order->n.runs; s->run++, s->into = 0) {
        const struct gm_order_run *run = &s->order->run[s->run];
        uint64_t page = run->first + s->into;
        bool took = take_between(s, &s->memory->region[run->region], &page, run->first + run->count, region, first,
                                 count);

        s->into = page - run->first;
        if (took)
            return true;
    }
    return false;
}

static bool take_from_cursor(struct gm_source *s, const struct gm_region **region, uint64_t *first, unsigned *count)
{
    for (; s->region < s->memory->count; s->region++, s->page = 0) {
        struct gm_region *r = &s->memory->region[s->region];

        if (take_between(s, r, &s->page, r->pages, region, first, count))
            return true;
    }
    return false;
}

bool gm_source_next(struct gm_source *s, const struct gm_region **region, uint64_t *first, unsigned *count)
{
    GM_LOCKED(&s->lock);

    if (take_from_order(s, region, first, count) || take_from_cursor(s, region, first, count))
        return true;
    if (s->from_start)
        return false;
    s->region = 0;
    s->page = 0;
    s->from_start = true;
    return take_from_cursor(s, region, first, count);
}
