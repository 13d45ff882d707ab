#include "bitmap.h"

#include <stdatomic.h>

bool gm_bitmap_test(const gm_word *bits, uint64_t index)
{
    return atomic_load(&bits[index / 64]) >> (index % 64) & 1;
}

uint64_t gm_bitmap_claim(gm_word *bits, uint64_t first, unsigned count)
{
    unsigned shift = first % 64;
    uint64_t mask = gm_ones(shift, count);
    uint64_t got = (mask & ~atomic_fetch_or(&bits[first / 64], mask)) >> shift;

    if (shift + count > 64) {
        mask = gm_ones(0, shift + count - 64);
        got |= (mask & ~atomic_fetch_or(&bits[first / 64 + 1], mask)) << (64 - shift);
    }
    return got;
}

void gm_bitmap_give_back(gm_word *bits, uint64_t first, uint64_t mask)
{
    unsigned shift = first % 64;

    atomic_fetch_and(&bits[first / 64], ~(mask << shift));
    if (shift && mask >> (64 - shift))
        atomic_fetch_and(&bits[first / 64 + 1], ~(mask >> (64 - shift)));
}

uint64_t gm_bitmap_set(gm_word *bits, uint64_t first, uint64_t count)
{
    uint64_t changed = 0;

    while (count) {
        unsigned shift = first % 64;
        uint64_t here = count < 64 - shift ? count : 64 - shift;
        uint64_t mask = gm_ones(shift, here);

        changed += (unsigned)__builtin_popcountll(mask & ~atomic_fetch_or(&bits[first / 64], mask));
        first += here;
        count -= here;
    }
    return changed;
}

void gm_bitmap_clear(gm_word *bits, uint64_t first, uint64_t count)
{
    while (count) {
        unsigned shift = first % 64;
        uint64_t here = count < 64 - shift ? count : 64 - shift;

        atomic_fetch_and(&bits[first / 64], ~gm_ones(shift, here));
        first += here;
        count -= here;
    }
}

uint64_t gm_bitmap_find(const gm_word *bits, uint64_t from, uint64_t end, bool value)
{
    while (from < end) {
        uint64_t word = atomic_load_explicit(&bits[from / 64], memory_order_acquire);

        word = (value ? word : ~word) & (~UINT64_C(0) << from % 64);
        if (word) {
            from = from / 64 * 64 + (unsigned)__builtin_ctzll(word);
            return from < end ? from : end;
        }
        from = (from / 64 + 1) * 64;
    }
    return end;
}

uint64_t gm_bitmap_count(const gm_word *bits, uint64_t count)
{
    uint64_t total = 0;

    for (size_t i = 0; i < gm_bitmap_words(count); i++) {
        uint64_t word = atomic_load_explicit(&bits[i], memory_order_relaxed) & gm_ones(0, count - 64 * i);

        total += (unsigned)__builtin_popcountll(word);
    }
    return total;
}

unsigned gm_mask_run(uint64_t mask, unsigned *at)
{
    if (*at >= 64 || !(mask >> *at))
        return 0;
    *at += (unsigned)__builtin_ctzll(mask >> *at);
    mask = ~(mask >> *at);
    return mask ? (unsigned)__builtin_ctzll(mask) : 64;
}
