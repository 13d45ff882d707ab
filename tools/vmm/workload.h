/*
 * What a page must contain and which page a step chooses: pure functions of the seed, used by the
 * guest program and by the model that computes, without looking at guest memory, what must be
 * there.
 */
#ifndef GMEMD_VMM_WORKLOAD_H
#define GMEMD_VMM_WORKLOAD_H

#include "guest.h"

/* Into the guest program nothing may be called and nothing may be instrumented. */
#define WORKLOAD                                                                                   \
    __attribute__((always_inline, no_sanitize("address", "undefined", "thread"))) static inline

#define WORKLOAD_GOLDEN 0x9e3779b97f4a7c15u /* 2^64 divided by the golden ratio, odd */

/* The finaliser of SplitMix64: a bijection in which every bit depends on every other. */
WORKLOAD uint64_t workload_mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* A number below `limit`, from a random one. */
WORKLOAD uint64_t workload_below(uint64_t random, uint64_t limit)
{
    return (uint64_t)(((unsigned __int128)random * limit) >> 64);
}

/* The content of a page: word i is first + i * increment. */
struct workload_content {
    uint64_t first, increment;
};

WORKLOAD struct workload_content workload_content(uint64_t seed, uint64_t page, uint64_t version)
{
    struct workload_content content = {0, 0};

    if (version) {
        content.first = workload_mix(workload_mix(seed + page * WORKLOAD_GOLDEN) + version);
        content.increment = WORKLOAD_GOLDEN;
    }
    return content;
}

/* Holes come in runs, as the free memory of a real guest does. */
enum { WORKLOAD_HOLE_PAGES = 16 };

WORKLOAD bool workload_is_hole(const struct guest_params *params, uint64_t page)
{
    uint64_t run = page / WORKLOAD_HOLE_PAGES;
    uint64_t random = workload_mix(~params->workload.seed + run * WORKLOAD_GOLDEN);

    return workload_below(random, 100) < params->workload.zero_share;
}

WORKLOAD uint64_t workload_owned(const struct guest_params *params, uint64_t id)
{
    uint64_t writable = params->data_pages - params->shared_pages;

    return (writable + params->vcpus - 1 - id) / params->vcpus;
}

WORKLOAD uint64_t workload_page(const struct guest_params *params, uint64_t id, uint64_t index)
{
    return params->shared_pages + index * params->vcpus + id;
}

/* Which of its pages a vCPU writes in a step, as an index among those that it owns. */
WORKLOAD uint64_t workload_choice(const struct guest_params *params, uint64_t owned, uint64_t id,
                                  uint64_t step)
{
    const struct guest_workload *workload = &params->workload;
    uint64_t random = workload_mix(workload->seed + (step * GUEST_VCPUS + id) * WORKLOAD_GOLDEN);
    uint64_t hot = owned * workload->hot_share / 100 + 1;

    if (workload->pattern == GUEST_SEQUENTIAL)
        return step % owned;
    if (workload->pattern == GUEST_STRIDED) /* shifted by one each round: comes to every page */
        return (step * workload->stride + step * workload->stride / owned) % owned;
    if (workload->pattern == GUEST_HOTSET && random % 10 != 0)
        return workload_below(random, hot < owned ? hot : owned);
    return workload_below(random, owned);
}

#endif
