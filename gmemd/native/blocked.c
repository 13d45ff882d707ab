#include "blocked.h"

#include "cleanup.h"

/* Past three quarters, searches grow long. */
enum { MOST_KNOWN = GM_MAX_THREADS / 4 * 3 };

static const uint32_t SPREAD = 2654435761u; /* Knuth's: thread ids come in a row */

void gm_blocked_init(struct gm_blocked *b)
{
    pthread_mutex_init(&b->lock, NULL);
}

void gm_blocked_deinit(struct gm_blocked *b)
{
    pthread_mutex_destroy(&b->lock);
}

static struct gm_blocked_slot *slot_of(struct gm_blocked *b, const struct gm_wait *wait)
{
    for (uint32_t at = wait->thread * SPREAD;; at++) {
        struct gm_blocked_slot *slot = &b->slot[at % GM_MAX_THREADS];

        if (slot->thread.waits && (slot->thread.thread != wait->thread || slot->thread.vcpu != wait->vcpu))
            continue;
        if (slot->thread.waits)
            return slot;
        if (b->known == MOST_KNOWN)
            return &b->slot[GM_MAX_THREADS];
        b->known++;
        slot->thread.thread = wait->thread;
        slot->thread.vcpu = wait->vcpu;
        return slot;
    }
}

void gm_blocked_add(struct gm_blocked *b, const struct gm_wait *wait, uint64_t now_ns)
{
    GM_LOCKED(&b->lock);
    struct gm_blocked_slot *slot = slot_of(b, wait);
    uint64_t waited = now_ns - wait->since_ns;
    uint64_t from = wait->since_ns > slot->until_ns ? wait->since_ns : slot->until_ns;

    slot->thread.waits++;
    if (waited > slot->thread.longest_ns)
        slot->thread.longest_ns = waited;
    if (now_ns > from)
        slot->thread.blocked_ns += now_ns - from;
    if (now_ns > slot->until_ns)
        slot->until_ns = now_ns;
}

unsigned gm_blocked_list(struct gm_blocked *b, struct gm_blocked_thread *out, unsigned most)
{
    GM_LOCKED(&b->lock);
    unsigned n = 0;

    for (unsigned i = 0; i <= GM_MAX_THREADS && n < most; i++)
        if (b->slot[i].thread.waits)
            out[n++] = b->slot[i].thread;
    return n;
}
