/*
 * Two threads at one source: the background takes what is next, the urgent lane takes the middle page of three, again and
 * again just when the background is about to take all three. Only C is fast enough to meet that moment.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>

typedef bool next_pages(void *source, const void **region, uint64_t *first, unsigned *count);
typedef uint64_t set_pages(uint64_t *bits, uint64_t first, uint64_t count);

struct race {
    void *source;
    next_pages *next;
    set_pages *set;
    uint64_t *claimed;
    uint64_t pages;
    uint64_t ready, done; /* the eight pages that the urgent lane is about to take from, and those that it has taken from */
};

static void a_moment(uint64_t *random, uint64_t most)
{
    *random = *random * 6364136223846793005u + 1442695040888963407u;
    for (volatile uint64_t wait = (*random >> 32) % most; wait; wait--)
        ;
}

static void wait_for(const uint64_t *value, uint64_t least)
{
    for (unsigned spun = 0; __atomic_load_n(value, __ATOMIC_ACQUIRE) < least; spun++)
        if (spun > 1000) /* the other has no CPU */
            sched_yield();
}

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

/* Of each eight pages, numbers 2 to 4 are free: takes 3. */
static void *take_middles(void *argument)
{
    struct race *r = argument;
    uint64_t random = 1;

    take_cpu(1);
    for (uint64_t eight = 1; eight <= r->pages / 8; eight++) {
        wait_for(&r->ready, eight);
        a_moment(&random, 64);
        r->set(r->claimed, 8 * (eight - 1) + 3, 1);
        __atomic_store_n(&r->done, eight, __ATOMIC_RELEASE);
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

/* Notes in `sent` how often each page was taken by the background. Leaves the thread on one CPU. */
int take_middle(struct race *r, uint8_t *sent)
{
    uint64_t random = 2;
    pthread_t urgent;

    if (pthread_create(&urgent, NULL, take_middles, r))
        return -1;
    take_cpu(0);
    for (uint64_t eight = 1; eight <= r->pages / 8; eight++) {
        __atomic_store_n(&r->ready, eight, __ATOMIC_RELEASE);
        a_moment(&random, 256); /* more, as the other hears of it a little later */
        take_next(r, sent);
        wait_for(&r->done, eight);
        if (!(r->claimed[(8 * eight - 4) / 64] >> (8 * eight - 4) % 64 & 1))
            take_next(r, sent);
    }
    while (take_next(r, sent))
        ;
    return pthread_join(urgent, NULL);
}
