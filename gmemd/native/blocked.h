/* How long each thread of a guest has waited for pages, over all of its waits. A vCPU that asks the VMM counts as one, too. */
#ifndef GM_BLOCKED_H
#define GM_BLOCKED_H

#include "waits.h"

/* python */
/* More than KVM has vCPUs of a guest by default, so that QEMU's other threads fit as well. Later ones count as thread 0. */
#define GM_MAX_THREADS 2048

struct gm_blocked_thread {
    uint64_t blocked_ns, longest_ns, waits;
    uint32_t thread, vcpu; /* as in struct gm_wait */
};
/* end python */

/* Open addressing; a slot without waits is free, and slot GM_MAX_THREADS is for those who find none. */
struct gm_blocked {
    pthread_mutex_t lock;
    unsigned known;
    struct gm_blocked_slot {
        struct gm_blocked_thread thread;
        uint64_t until_ns;
    } slot[GM_MAX_THREADS + 1];
};

void gm_blocked_init(struct gm_blocked *b);
void gm_blocked_deinit(struct gm_blocked *b);

/* Counts a wait that ended now. What a thread's waits have in common, as when a signal makes it fault twice, counts once. */
void gm_blocked_add(struct gm_blocked *b, const struct gm_wait *wait, uint64_t now_ns);

/* Copies out all threads that have waited, `most` at the most; returns how many. */
unsigned gm_blocked_list(struct gm_blocked *b, struct gm_blocked_thread *out, unsigned most);

#endif
