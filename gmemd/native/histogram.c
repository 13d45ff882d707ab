#include "histogram.h"

#include <stdatomic.h>

enum { SUB_BITS = 4, SUB = 1 << SUB_BITS };

static unsigned bucket_of(uint64_t ns)
{
    unsigned octave, bucket;

    if (ns < SUB)
        return (unsigned)ns;
    octave = 63 - (unsigned)__builtin_clzll(ns);
    bucket = (octave - SUB_BITS + 1) * SUB + (unsigned)(ns >> (octave - SUB_BITS) & (SUB - 1));
    return bucket < GM_BUCKETS ? bucket : GM_BUCKETS - 1;
}

uint64_t gm_histogram_bound(unsigned bucket)
{
    unsigned octave;

    if (bucket < SUB)
        return bucket;
    octave = bucket / SUB - 1;
    return (uint64_t)(SUB + bucket % SUB) << octave;
}

void gm_histogram_record(struct gm_histogram *h, uint64_t ns)
{
    uint64_t max = atomic_load_explicit(&h->max_ns, memory_order_relaxed);

    atomic_fetch_add_explicit(&h->counts[bucket_of(ns)], 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&h->sum_ns, ns, memory_order_relaxed);
    while (ns > max && !atomic_compare_exchange_weak(&h->max_ns, &max, ns))
        ;
}

uint64_t gm_histogram_count(const struct gm_histogram *h)
{
    uint64_t count = 0;

    for (unsigned i = 0; i < GM_BUCKETS; i++)
        count += atomic_load_explicit(&h->counts[i], memory_order_relaxed);
    return count;
}

uint64_t gm_histogram_sum_ns(const struct gm_histogram *h)
{
    return atomic_load_explicit(&h->sum_ns, memory_order_relaxed);
}

uint64_t gm_histogram_max_ns(const struct gm_histogram *h)
{
    return atomic_load_explicit(&h->max_ns, memory_order_relaxed);
}

void gm_histogram_counts(const struct gm_histogram *h, uint64_t *out)
{
    for (unsigned i = 0; i < GM_BUCKETS; i++)
        out[i] = atomic_load_explicit(&h->counts[i], memory_order_relaxed);
}

static uint64_t percentile(const uint64_t *counts, uint64_t rank)
{
    uint64_t seen = 0;

    for (unsigned i = 0; i < GM_BUCKETS; i++) {
        seen += counts[i];
        if (seen > rank)
            return i + 1 < GM_BUCKETS ? (gm_histogram_bound(i) + gm_histogram_bound(i + 1)) / 2
                                      : gm_histogram_bound(i);
    }
    return 0;
}

void gm_histogram_percentiles(const struct gm_histogram *h, const uint32_t *parts, uint64_t *out, unsigned n)
{
    uint64_t counts[GM_BUCKETS];
    uint64_t max = gm_histogram_max_ns(h);
    uint64_t total = 0;

    gm_histogram_counts(h, counts);
    for (unsigned i = 0; i < GM_BUCKETS; i++)
        total += counts[i];
    for (unsigned i = 0; i < n; i++) {
        uint64_t value = total ? percentile(counts, (total - 1) * parts[i] / 1000000) : 0;

        out[i] = value < max ? value : max;
    }
}
