/*
 * A latency histogram: 16 buckets an octave from 1 ns to 18 minutes, so a value is known to within 6 %. Recording is one
 * atomic addition; reading takes no lock and may be a few values behind.
 */
#ifndef GM_HISTOGRAM_H
#define GM_HISTOGRAM_H

#include <stdint.h>

/* python */
#define GM_BUCKETS 640

struct gm_histogram;

/* The values (ns) below which `parts[i]` of every million lie, into out[i]. */
void gm_histogram_percentiles(const struct gm_histogram *h, const uint32_t *parts, uint64_t *out, unsigned n);
uint64_t gm_histogram_count(const struct gm_histogram *h);
uint64_t gm_histogram_sum_ns(const struct gm_histogram *h);
uint64_t gm_histogram_max_ns(const struct gm_histogram *h);
/* Copies GM_BUCKETS counts; returns the lower bound (ns) of bucket `i` by gm_histogram_bound(i). */
void gm_histogram_counts(const struct gm_histogram *h, uint64_t *out);
uint64_t gm_histogram_bound(unsigned bucket);
/* end python */

struct gm_histogram {
    _Atomic uint64_t counts[GM_BUCKETS];
    _Atomic uint64_t sum_ns;
    _Atomic uint64_t max_ns;
};

void gm_histogram_record(struct gm_histogram *h, uint64_t ns);

#endif
