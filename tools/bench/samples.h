/* Durations, all of them kept, so that every percentile is exact. */
#ifndef GMEMD_BENCH_SAMPLES_H
#define GMEMD_BENCH_SAMPLES_H

#include <stddef.h>
#include <stdint.h>

#include "../vmm/json.h"

struct samples {
    uint64_t *ns;
    size_t count, room;
};

/* In memory that a forked child shares, and that is there already: filling it in takes no fault. */
struct samples samples_create(size_t room);

static inline void samples_add(struct samples *samples, uint64_t ns)
{
    if (samples->count < samples->room)
        samples->ns[samples->count++] = ns;
}

/* Adds a member: count, percentiles, max, mean and sum, in microseconds. Sorts the samples. */
void samples_report(struct samples *samples, struct json *json, const char *key);

#endif
