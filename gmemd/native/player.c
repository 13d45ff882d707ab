/*
 * Whether a touch had to wait is what the kernel says: it counts how often a thread gives up its
 * CPU to sleep. Faults would not tell: a page that is there and not yet mapped is one, too, and
 * takes no time.
 */
#include "player.h"

#include "clock.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>

enum {
    ZERO_SHARE = 8,             /* one page of so many is zero */
    SPIN_NS = 20 * 1000,        /* a shorter sleep is not worth waking up from */
    LONGEST_SLEEP_NS = 50 * 1000 * 1000, /* so that a stop need not wait long */
};

struct gm_player {
    uint64_t seed;
    uint32_t count;
    _Atomic bool stopped;
    struct area {
        char *at;
        uint64_t pages, words; /* words of a page */
        uint32_t page_shift;
        _Atomic uint32_t *writes; /* to each page, counted before they are done */
    } area[];
};

/* The finaliser of splitmix64: every bit of the input changes half of the output's. */
static uint64_t mixed(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

static uint64_t key_of(const struct gm_player *p, uint32_t region, uint64_t page)
{
    return mixed(p->seed ^ mixed(page ^ (uint64_t)region << 48));
}

static uint64_t word_of(uint64_t key, uint64_t index)
{
    return key % ZERO_SHARE ? mixed(key + (index + 1) * 0x9e3779b97f4a7c15) : 0;
}

static _Atomic uint64_t *words_of(const struct area *area, uint64_t page)
{
    return (_Atomic uint64_t *)(void *)(area->at + (page << area->page_shift));
}

struct gm_player *gm_player_new(const struct gm_player_region *regions, uint32_t count,
                                uint64_t seed, struct gm_problem *ret)
{
    struct gm_player *p = calloc(1, sizeof *p + count * sizeof p->area[0]);

    for (uint32_t i = 0; p && i < count; i++) {
        p->area[i] = (struct area){
            .at = (char *)(uintptr_t)regions[i].hva,
            .pages = regions[i].pages,
            .words = (1ull << regions[i].page_shift) / sizeof(uint64_t),
            .page_shift = regions[i].page_shift,
            .writes = calloc(regions[i].pages, sizeof *p->area[i].writes),
        };
        p->count++;
        if (!p->area[i].writes) {
            gm_player_free(p);
            p = NULL;
        }
    }
    if (!p) {
        gm_blame(ret, GM_KERNEL, ENOMEM, "player");
        return NULL;
    }
    p->seed = seed;
    return p;
}

void gm_player_free(struct gm_player *p)
{
    for (uint32_t i = 0; p && i < p->count; i++)
        free((void *)p->area[i].writes);
    free(p);
}

void gm_player_fill(const struct gm_player *p, uint32_t region, uint64_t at)
{
    const struct area *area = &p->area[region];
    uint64_t *word = (uint64_t *)(uintptr_t)at;

    for (uint64_t page = 0; page < area->pages; page++, word += area->words) {
        uint64_t key = key_of(p, region, page);

        for (uint64_t i = 0; key % ZERO_SHARE && i < area->words; i++)
            word[i] = word_of(key, i);
    }
}

/* Compares a page. Unless `settled`, its last word may be behind the writes that are announced. */
static int check_page(const struct gm_player *p, uint32_t region, uint64_t page, bool settled,
                      struct gm_problem *ret)
{
    const struct area *area = &p->area[region];
    _Atomic uint64_t *word = words_of(area, page);
    uint64_t key = key_of(p, region, page);

    for (uint64_t i = 0; i < area->words; i++) {
        uint64_t seen = atomic_load_explicit(&word[i], memory_order_acquire);
        uint64_t added = seen - word_of(key, i);
        uint64_t writes = i < area->words - 1 ? 0 : atomic_load(&area->writes[page]);

        if (settled ? added == writes : added <= writes)
            continue;
        return gm_blame(ret, GM_PEER, 0,
                        "region %u: page %llu: word %llu is %#llx and must be %#llx", region,
                        (unsigned long long)page, (unsigned long long)i, (unsigned long long)seen,
                        (unsigned long long)(word_of(key, i) + writes));
    }
    return 0;
}

int gm_player_check(const struct gm_player *p, uint32_t region, struct gm_problem *ret)
{
    for (uint64_t page = 0; page < p->area[region].pages; page++)
        if (check_page(p, region, page, true, ret) < 0)
            return -1;
    return 0;
}

/* Returns false when stopped. */
static bool wait_until(const struct gm_player *p, uint64_t due)
{
    for (;;) {
        uint64_t now = gm_now_ns();
        uint64_t until = due < now + LONGEST_SLEEP_NS ? due : now + LONGEST_SLEEP_NS;
        struct timespec time = {(time_t)(until / 1000000000), (long)(until % 1000000000)};

        if (atomic_load_explicit(&p->stopped, memory_order_relaxed))
            return false;
        if (now >= due)
            return true;
        if (due - now > SPIN_NS)
            clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL);
    }
}

static uint64_t sleeps_of_thread(void)
{
    struct rusage usage;

    getrusage(RUSAGE_THREAD, &usage);
    return (uint64_t)usage.ru_nvcsw;
}

static void touch(struct area *area, const struct gm_trace_record *access, struct gm_touch *out)
{
    _Atomic uint64_t *word = words_of(area, access->page);
    uint64_t sleeps = sleeps_of_thread();

    if (access->flags & GM_TRACE_WRITE) {
        atomic_fetch_add(&area->writes[access->page], 1);
        out->began_ns = gm_now_ns();
        atomic_fetch_add(&word[area->words - 1], 1);
    } else {
        out->began_ns = gm_now_ns();
        (void)atomic_load_explicit(&word[0], memory_order_acquire);
    }
    out->took_ns = gm_now_ns() - out->began_ns;
    out->waited = sleeps_of_thread() != sleeps;
}

int64_t gm_player_run(struct gm_player *p, const struct gm_trace_record *accesses, uint64_t n,
                      uint64_t origin_ns, uint64_t start_ns, double pace, struct gm_touch *out,
                      struct gm_problem *ret)
{
    uint64_t due = start_ns, before = origin_ns, i;

    /* The usual 50 µs would be as long as a fault. */
    prctl(PR_SET_TIMERSLACK, 1ul);
    for (i = 0; i < n; i++) {
        const struct gm_trace_record *access = &accesses[i];
        uint64_t now = gm_now_ns();

        due += (uint64_t)((double)(access->time_ns - before) * pace);
        before = access->time_ns;
        if (due < now)
            due = now;
        if (!wait_until(p, due))
            break;
        touch(&p->area[access->region], access, &out[i]);
        if (atomic_load(&p->stopped))
            break;
        if (check_page(p, access->region, access->page, false, ret) < 0)
            return -1;
    }
    return (int64_t)i;
}

void gm_player_stop(struct gm_player *p)
{
    atomic_store(&p->stopped, true);
}
