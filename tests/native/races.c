/*
 * Two threads that meet in the same few nanoseconds, again and again: only C is fast enough for that. Each goes in step with the
 * other, and waits a random moment before its move.
 */
#define _GNU_SOURCE
#include "gmemd/native/bitmap.h"
#include "gmemd/native/faults.h"
#include "gmemd/native/install.h"
#include "gmemd/native/source.h"

#include <pthread.h>
#include <sched.h>

struct race {
    struct gm_source *source;
    struct gm_destination *destination;
    struct gm_region *region;
    gm_word *bits;
    uint64_t pages;
    _Atomic uint64_t step[2]; /* where each of the two is */
    uint64_t got;             /* what the other thread has to say */
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
    r->step[me] = step;
    for (unsigned spun = 0; r->step[!me] < step; spun++) {
        __builtin_ia32_pause(); /* has an emulated CPU give way, too */
        if (spun > 1000) /* the other has no CPU */
            sched_yield();
    }
}

static void a_moment(uint64_t *random)
{
    *random = *random * 6364136223846793005u + 1442695040888963407u;
    for (volatile uint64_t wait = *random >> 58; wait; wait--)
        ;
}

/* Both claim the same pages. */

enum { CLAIM = 64, STRIDE = 40 };

static uint64_t claim_all(struct race *r, int me)
{
    uint64_t got = 0, random = (uint64_t)me;

    take_cpu(me);
    for (uint64_t first = 0; first + CLAIM <= r->pages; first += STRIDE) {
        in_step(r, me, first + 1);
        a_moment(&random);
        got += (unsigned)__builtin_popcountll(gm_bitmap_claim(r->bits, first, CLAIM));
    }
    return got;
}

static void *claim_other(void *race)
{
    struct race *r = race;

    r->got = claim_all(r, 1);
    return NULL;
}

/* Returns how many pages they got together. */
uint64_t race_claims(gm_word *bits, uint64_t pages)
{
    struct race r = {.bits = bits, .pages = pages};
    pthread_t other;
    uint64_t got;

    if (pthread_create(&other, NULL, claim_other, &r))
        return 0;
    got = claim_all(&r, 0);
    pthread_join(other, NULL);
    return got + r.got;
}

/* Of each eight pages, numbers 2 to 4 are free: the urgent lane takes 3, the background all of them, or what is left. */

static void *take_middles(void *race)
{
    struct race *r = race;
    uint64_t random = 1;

    take_cpu(1);
    for (uint64_t eight = 0; eight < r->pages / 8; eight++) {
        in_step(r, 1, 2 * eight + 1);
        a_moment(&random);
        gm_bitmap_set(r->bits, 8 * eight + 3, 1);
        in_step(r, 1, 2 * eight + 2);
    }
    return NULL;
}

static bool take_next(struct race *r, uint8_t *sent)
{
    const struct gm_region *region;
    uint64_t first;
    unsigned count;

    if (!gm_source_next(r->source, &region, &first, &count))
        return false;
    for (unsigned i = 0; i < count; i++)
        sent[first + i]++;
    return true;
}

/* Notes in `sent` how often the background took each page. */
int race_source(struct gm_source *source, uint8_t *sent)
{
    struct gm_region *region = &source->memory->region[0];
    struct race r = {.source = source, .bits = region->claimed, .pages = region->pages};
    uint64_t random = 2;
    pthread_t urgent;

    if (pthread_create(&urgent, NULL, take_middles, &r))
        return -1;
    take_cpu(0);
    for (uint64_t eight = 0; eight < r.pages / 8; eight++) {
        in_step(&r, 0, 2 * eight + 1);
        a_moment(&random);
        take_next(&r, sent);
        in_step(&r, 0, 2 * eight + 2);
        if (!gm_bitmap_test(r.bits, 8 * eight + 4))
            take_next(&r, sent);
    }
    while (take_next(&r, sent))
        ;
    return pthread_join(urgent, NULL);
}

/* A page is removed just when a lane begins to install it. */

static void *remove_pages(void *race)
{
    struct race *r = race;
    uint64_t random = 1;

    take_cpu(1);
    for (uint64_t page = 0; page < r->pages; page++) {
        in_step(r, 1, 2 * page + 1);
        a_moment(&random);
        gm_install_events_begin(r->destination);
        gm_install_removed(r->destination, r->region, page, 1);
        gm_install_events_end(r->destination);
        in_step(r, 1, 2 * page + 2);
    }
    return NULL;
}

/* Returns how many removals the lane would not have heard of, or -1. */
int race_removal(struct gm_destination *destination, unsigned lane)
{
    struct gm_region *region = &destination->memory->region[0];
    struct race r = {.destination = destination, .region = region, .pages = region->pages};
    uint64_t random = 2;
    pthread_t reader;
    int lost = 0;

    if (pthread_create(&reader, NULL, remove_pages, &r))
        return -1;
    take_cpu(0);
    for (uint64_t page = 0; page < r.pages; page++) {
        struct gm_problem problem;
        struct gm_install in;

        in_step(&r, 0, 2 * page + 1);
        a_moment(&random);
        if (gm_install_begin(&in, destination, lane, region, page, 1, &problem) < 0)
            return -1;
        in_step(&r, 0, 2 * page + 2);
        lost += in.claimed && !in.slot->removed;
        gm_install_finish(&in);
    }
    pthread_join(reader, NULL);
    return lost;
}

/* A vCPU asks for a page just when that is received: the moment between, for which the lock of the waits holds the pager up. */

static void *read_request(void *race)
{
    static struct gm_port port;
    struct race *r = race;
    struct gm_problem problem;

    port = (struct gm_port){.destination = r->destination};
    r->got = (uint64_t)gm_faults_read_vcpus(&port, &problem);
    return NULL;
}

/* Waits until somebody else wants it, too: glibc's lock is 2 then. */
static void until_wanted(pthread_mutex_t *lock)
{
    while (__atomic_load_n(&lock->__data.__lock, __ATOMIC_SEQ_CST) != 2)
        sched_yield();
}

/* There is a request on the fault socket for page 0, whose content comes meanwhile. Returns how many wait afterwards, or -1. */
int race_asking(struct gm_destination *destination, unsigned lane, const unsigned char *content)
{
    struct race r = {.destination = destination};
    struct gm_problem problem;
    struct gm_install in;
    pthread_t pager;

    if (gm_install_begin(&in, destination, lane, &destination->memory->region[0], 0, 1, &problem) < 0 ||
        gm_install_populate(&in, content, &problem) < 0)
        return -1;
    pthread_mutex_lock(&destination->waits.lock);
    if (pthread_create(&pager, NULL, read_request, &r))
        return -1;
    until_wanted(&destination->waits.lock);
    gm_install_finish(&in);
    pthread_mutex_unlock(&destination->waits.lock);
    pthread_join(pager, NULL);
    return r.got == 1 ? (int)destination->waits.count : -1;
}

/* A vCPU looks at its bit just when a lane clears it. */

static void *look_at_bits(void *race)
{
    struct race *r = race;

    take_cpu(1);
    for (uint64_t word = 0; word < r->pages / 64; word++) {
        in_step(r, 1, word + 1);
        for (unsigned spun = 0; atomic_load(&r->region->userfault[word]); spun++)
            if (spun > 1000) /* the other has no CPU */
                sched_yield();
        r->got += !atomic_load(&r->region->received[word]);
    }
    return NULL;
}

/* Returns how often a vCPU would have passed before its page was received, or -1. */
int race_marking(struct gm_destination *destination, unsigned lane)
{
    struct gm_region *region = &destination->memory->region[0];
    struct race r = {.destination = destination, .region = region, .pages = region->pages};
    pthread_t vcpu;

    if (pthread_create(&vcpu, NULL, look_at_bits, &r))
        return -1;
    take_cpu(0);
    for (uint64_t word = 0; word < r.pages / 64; word++) {
        struct gm_problem problem;
        struct gm_install in;

        in_step(&r, 0, word + 1);
        if (gm_install_begin(&in, destination, lane, region, 64 * word, 64, &problem) < 0 ||
            gm_install_populate(&in, NULL, &problem) < 0)
            return -1;
        gm_install_finish(&in);
    }
    pthread_join(vcpu, NULL);
    return (int)r.got;
}
