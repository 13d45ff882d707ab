/*
 * Bitmaps of pages, shared by threads and, through the state memfd, by a daemon and its successor.
 *
 * Bit i of a bitmap is bit i % 64 of word i / 64. Every change is one atomic operation on one word, so a bitmap is never
 * seen in between, not even by a process that takes over after a SIGKILL.
 */
#ifndef GM_BITMAP_H
#define GM_BITMAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef _Atomic uint64_t gm_word;

/* Words that a bitmap of `bits` bits needs. */
static inline size_t gm_bitmap_words(uint64_t bits)
{
    return (size_t)((bits + 63) / 64);
}

/* `count` ones from bit `shift` on; those beyond bit 63 fall away. */
static inline uint64_t gm_ones(unsigned shift, uint64_t count)
{
    return (count >= 64 ? ~UINT64_C(0) : (UINT64_C(1) << count) - 1) << shift;
}

bool gm_bitmap_test(const gm_word *bits, uint64_t index);

/* Sets at most 64 bits from `first`. Returns those that were clear before: bit i stands for first + i. */
uint64_t gm_bitmap_claim(gm_word *bits, uint64_t first, unsigned count);

/* Clears the bits from `first` that `mask` names. */
void gm_bitmap_give_back(gm_word *bits, uint64_t first, uint64_t mask);

/* Sets any number of bits. Returns how many were clear before. */
uint64_t gm_bitmap_set(gm_word *bits, uint64_t first, uint64_t count);

/* Clears any number of bits, after everything that was written before. */
void gm_bitmap_clear(gm_word *bits, uint64_t first, uint64_t count);

/* The first index in [from, end) whose bit is `value`, or `end`. */
uint64_t gm_bitmap_find(const gm_word *bits, uint64_t from, uint64_t end, bool value);

uint64_t gm_bitmap_count(const gm_word *bits, uint64_t count);

/* The next run of ones in `mask` at or after bit *at: puts its start into *at, returns its length, 0 if there is none. */
unsigned gm_mask_run(uint64_t mask, unsigned *at);

#endif
