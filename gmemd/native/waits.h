/*
 * Who waits for which page, and since when: one entry a fault message that was read and not yet answered. From it come the
 * latency histogram, the answer to "what is stuck", and the knowledge that a page was asked for already.
 *
 * There are about as many entries as the guest has vCPUs, so the table is a plain array.
 */
#ifndef GM_WAITS_H
#define GM_WAITS_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* python */
/* More messages than this stay in the kernel until some are answered. */
#define GM_MAX_WAITS 1024

struct gm_wait {
    uint64_t page, since_ns;
    uint32_t region;
    uint32_t vcpu;   /* 1: a vCPU that left KVM_RUN and asked the VMM; 0: a thread that waits in the kernel */
    uint32_t thread; /* the number of either */
    uint32_t reserved;
};
/* end python */

struct gm_waits {
    pthread_mutex_t lock;
    _Atomic uint32_t count;
    struct gm_wait entry[GM_MAX_WAITS];
};

void gm_waits_init(struct gm_waits *w);
void gm_waits_deinit(struct gm_waits *w);

/* Adds one; the caller has seen that there is room. Returns whether it is the first for its page. */
bool gm_waits_add(struct gm_waits *w, const struct gm_wait *wait);

/* Takes one out that waits for one of the pages; false if there is none. */
bool gm_waits_take(struct gm_waits *w, uint32_t region, uint64_t first, uint64_t count, struct gm_wait *out);

/* Whether anybody waits for one of the pages. */
bool gm_waits_within(struct gm_waits *w, uint32_t region, uint64_t first, uint64_t count);

/* Copies them out, `most` at the most; returns how many. */
unsigned gm_waits_list(struct gm_waits *w, struct gm_wait *out, unsigned most);

static inline bool gm_waits_any(const struct gm_waits *w)
{
    return atomic_load(&w->count) != 0;
}

#endif
