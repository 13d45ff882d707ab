#include "trace.h"

#include <stdatomic.h>
#include <stdlib.h>

struct gm_trace {
    _Atomic uint32_t head, tail; /* free-running: written and read so far */
    _Atomic uint64_t lost;
    uint32_t mask;
    struct gm_trace_record ring[];
};

struct gm_trace *gm_trace_new(uint32_t records)
{
    struct gm_trace *t = calloc(1, sizeof *t + records * sizeof t->ring[0]);

    if (t)
        t->mask = records - 1;
    return t;
}

void gm_trace_free(struct gm_trace *t)
{
    free(t);
}

void gm_trace_write(struct gm_trace *t, const struct gm_trace_record *record)
{
    uint32_t head = atomic_load_explicit(&t->head, memory_order_relaxed);

    if (head - atomic_load_explicit(&t->tail, memory_order_acquire) > t->mask) {
        atomic_fetch_add_explicit(&t->lost, 1, memory_order_relaxed);
        return;
    }
    t->ring[head & t->mask] = *record;
    atomic_store_explicit(&t->head, head + 1, memory_order_release);
}

uint32_t gm_trace_read(struct gm_trace *t, struct gm_trace_record *out, uint32_t most)
{
    uint32_t tail = atomic_load_explicit(&t->tail, memory_order_relaxed);
    uint32_t n = atomic_load_explicit(&t->head, memory_order_acquire) - tail;

    if (n > most)
        n = most;
    for (uint32_t i = 0; i < n; i++)
        out[i] = t->ring[(tail + i) & t->mask];
    atomic_store_explicit(&t->tail, tail + n, memory_order_release);
    return n;
}

uint64_t gm_trace_lost(struct gm_trace *t)
{
    return atomic_exchange(&t->lost, 0);
}
