/*
 * Two threads that meet in the same few nanoseconds, again and again: only C is fast enough for that. Each goes in step with the
 * other, and waits a random moment before its move.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>

typedef uint64_t claim_pages(uint64_t *bits, uint64_t first, unsigned count);
typedef uint64_t set_pages(uint64_t *bits, uint64_t first, uint64_t count);
typedef bool next_pages(void *source, const void **region, uint64_t *first, unsigned *count);

struct race {
    void *source;
    next_pages *next;
    set_pages *set;
    claim_pages *claim;
    uint64_t *claimed;
    uint64_t pages;
    uint64_t step[2]; /* where each of the two is */
    uint64_t got;     /* pages that the other thread has claimed */
};

/* On CPUs of their own, the two meet; on one, hardly ever. */
static void take_cpu(int number)
{
    cpu_set_t may, cpu;

    sched_getaffinity(0, sizeof may, &may);
    CPU_ZERO(&cpu);
    for (int i = 0; i < CPU_SETSIZE && number >= 0; i++)
        if (CPU_ISSET(i, &may) && number-- == 0)
            CPU_SET(i, &cpu);
    if (CPU_COUNT(&cpu))
        sched_setaffinity(0, sizeof cpu, &cpu);
}

/* Says that thread `me` has come to a step, and waits until the other has, too. */
static void in_step(struct race *r, int me, uint64_t step)
{
    __atomic_store_n(&r->step[me], step, __ATOMIC_SEQ_CST);
    for (unsigned spun = 0; __atomic_load_n(&r->step[!me], __ATOMIC_SEQ_CST) < step; spun++)
        if (spun > 1000) /* the other has no CPU */
            sched_yield();
}

static void a_moment(uint64_t *random)
{
    *random = *random * 6364136223846793005u + 1442695040888963407u;
    for (volatile uint64_t wait = *random >> 58; wait; wait--)
        ;
}

enum { CLAIM = 64, STRIDE = 40 };

static uint64_t claim_all(struct race *r, int me)
{
    uint64_t got = 0, random = (uint64_t)me;

    take_cpu(me);
    for (uint64_t first = 0; first + CLAIM <= r->pages; first += STRIDE) {
        in_step(r, me, first + 1);
        a_moment(&random);
        got += (unsigned)__builtin_popcountll(r->claim(r->claimed, first, CLAIM));
    }
    return got;
}

static void *claim_too(void *argument)
{
    struct race *r = argument;

    r->got = claim_all(r, 1);
    return NULL;
}

/* Both claim the same pages at the same time. Returns how many they got together. */
uint64_t claim_together(struct race *r)
{
    pthread_t other;
    uint64_t got;

    if (pthread_create(&other, NULL, claim_too, r))
        return 0;
    got = claim_all(r, 0);
    pthread_join(other, NULL);
    return got + r->got;
}

/* Of each eight pages, numbers 2 to 4 are free: the urgent lane takes 3. */
static void *take_middles(void *argument)
{
    struct race *r = argument;
    uint64_t random = 1;

    take_cpu(1);
    for (uint64_t eight = 0; eight < r->pages / 8; eight++) {
        in_step(r, 1, 2 * eight + 1);
        a_moment(&random);
        r->set(r->claimed, 8 * eight + 3, 1);
        in_step(r, 1, 2 * eight + 2);
    }
    return NULL;
}

static bool take_next(struct race *r, uint8_t *sent)
{
    const void *region;
    uint64_t first;
    unsigned count;

    if (!r->next(r->source, &region, &first, &count))
        return false;
    for (unsigned i = 0; i < count; i++)
        sent[first + i]++;
    return true;
}

static bool taken(const struct race *r, uint64_t page)
{
    return r->claimed[page / 64] >> page % 64 & 1;
}

/* The background takes all three, or what the urgent lane leaves. Notes in `sent` how often it took each page. */
int take_middle(struct race *r, uint8_t *sent)
{
    uint64_t random = 2;
    pthread_t urgent;

    if (pthread_create(&urgent, NULL, take_middles, r))
        return -1;
    take_cpu(0);
    for (uint64_t eight = 0; eight < r->pages / 8; eight++) {
        in_step(r, 0, 2 * eight + 1);
        a_moment(&random);
        take_next(r, sent);
        in_step(r, 0, 2 * eight + 2);
        if (!taken(r, 8 * eight + 4))
            take_next(r, sent);
    }
    while (take_next(r, sent))
        ;
    return pthread_join(urgent, NULL);
}
