/*
 * Which page comes next: pure arithmetic in 32 bits, shared by the threads of bench guests and by the guest that runs
 * in QEMU, so that all of them touch the same pages in the same order.
 */
#ifndef GMEMD_BENCH_PATTERN_H
#define GMEMD_BENCH_PATTERN_H

#include <stdint.h>

enum { PATTERN_PAGE = 4096, PATTERN_ROUNDS = 4 };

/* The finaliser of MurmurHash3: every bit depends on every other. */
static inline uint32_t pattern_mix(uint32_t x)
{
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return x ^ (x >> 16);
}

/* Half the bits of the smallest even number of bits that hold every page's number. */
static inline unsigned pattern_half(uint32_t pages)
{
    unsigned half = 1;

    while (half < 16 && ((pages - 1) >> (2 * half)))
        half++;
    return half;
}

/*
 * The page at a place in a random order in which each page stands once: a Feistel network, walked until it comes to a
 * number below `pages`. It needs no table and has no stride that a prefetcher could find.
 */
static inline uint32_t pattern_shuffled(uint32_t place, uint32_t pages, unsigned half)
{
    uint32_t mask = (1u << half) - 1;

    do {
        uint32_t left = place >> half, right = place & mask;

        for (uint32_t round = 1; round <= PATTERN_ROUNDS; round++) {
            uint32_t next = left ^ (pattern_mix(right + round * 0x9e3779b9u) & mask);

            left = right;
            right = next;
        }
        place = left << half | right;
    } while (place >= pages);
    return place;
}

#endif
