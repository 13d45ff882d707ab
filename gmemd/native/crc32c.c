/*
 * CRC-32C as in RFC 3720 B.4: reflected polynomial 0x82f63b78, initial value and final xor all ones.
 *
 * The CPU's instruction takes 8 bytes, has its result after three cycles, and can begin another in each. So three stretches are
 * summed at a time, and put together: to append a stretch is to shift what was before by its length in zero bytes, which is linear,
 * and looked up byte by byte.
 */
#include "crc32c.h"

#include <pthread.h>
#include <stdbool.h>
#include <string.h>

enum {
    SLICES = 8,
    STRETCH = 1360, /* three of them and 16 bytes are a page */
};

static uint32_t table[SLICES][256];
static uint32_t behind_stretch[4][256]; /* byte i of a sum, with a stretch of zeros behind it */
static bool has_instruction;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static uint32_t with_zeros(uint32_t crc, unsigned bytes)
{
    while (bytes--)
        crc = crc >> 8 ^ table[0][crc & 255];
    return crc;
}

static void prepare(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;

        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
        table[0][i] = crc;
    }
    for (uint32_t i = 0; i < 256; i++)
        for (int slice = 1; slice < SLICES; slice++)
            table[slice][i] = table[slice - 1][i] >> 8 ^ table[0][table[slice - 1][i] & 255];
    for (uint32_t i = 1; i < 256; i++)
        for (int byte = 0; byte < 4; byte++) {
            uint32_t *row = behind_stretch[byte];
            uint32_t rest = i & (i - 1);

            row[i] = rest ? row[rest] ^ row[i ^ rest] : with_zeros(i << 8 * byte, STRETCH);
        }
#if defined(__x86_64__)
    has_instruction = __builtin_cpu_supports("sse4.2");
#endif
}

static uint32_t bytewise(uint32_t crc, const unsigned char *data, size_t length)
{
    while (length--)
        crc = crc >> 8 ^ table[0][(crc ^ *data++) & 255];
    return crc;
}

static uint32_t sliced(uint32_t crc, const unsigned char *data, size_t length)
{
    for (; length >= 8; data += 8, length -= 8) {
        uint32_t low = crc ^ ((uint32_t)data[0] | (uint32_t)data[1] << 8 | (uint32_t)data[2] << 16 |
                              (uint32_t)data[3] << 24);

        crc = table[7][low & 255] ^ table[6][low >> 8 & 255] ^ table[5][low >> 16 & 255] ^
              table[4][low >> 24] ^ table[3][data[4]] ^ table[2][data[5]] ^ table[1][data[6]] ^
              table[0][data[7]];
    }
    return bytewise(crc, data, length);
}

#if defined(__x86_64__)
static uint32_t append_stretch(uint32_t crc, uint32_t stretch)
{
    return behind_stretch[0][crc & 255] ^ behind_stretch[1][crc >> 8 & 255] ^
           behind_stretch[2][crc >> 16 & 255] ^ behind_stretch[3][crc >> 24] ^ stretch;
}

__attribute__((target("sse4.2"))) static uint32_t three_stretches(uint32_t crc, const unsigned char *data)
{
    uint64_t sums[3] = {crc};

    for (size_t at = 0; at < STRETCH; at += 8) {
        uint64_t words[3];

        memcpy(&words[0], data + at, 8);
        memcpy(&words[1], data + STRETCH + at, 8);
        memcpy(&words[2], data + 2 * STRETCH + at, 8);
        sums[0] = __builtin_ia32_crc32di(sums[0], words[0]);
        sums[1] = __builtin_ia32_crc32di(sums[1], words[1]);
        sums[2] = __builtin_ia32_crc32di(sums[2], words[2]);
    }
    return append_stretch(append_stretch((uint32_t)sums[0], (uint32_t)sums[1]), (uint32_t)sums[2]);
}

__attribute__((target("sse4.2"))) static uint32_t instruction(uint32_t crc, const unsigned char *data,
                                                              size_t length)
{
    uint64_t wide;

    for (; length >= 3 * STRETCH; data += 3 * STRETCH, length -= 3 * STRETCH)
        crc = three_stretches(crc, data);
    wide = crc;
    for (; length >= 8; data += 8, length -= 8) {
        uint64_t word;

        memcpy(&word, data, 8);
        wide = __builtin_ia32_crc32di(wide, word);
    }
    return bytewise((uint32_t)wide, data, length);
}
#endif

uint32_t gm_crc32c_portable(uint32_t crc, const void *data, size_t length)
{
    pthread_once(&once, prepare);
    return ~sliced(~crc, data, length);
}

uint32_t gm_crc32c(uint32_t crc, const void *data, size_t length)
{
    pthread_once(&once, prepare);
#if defined(__x86_64__)
    if (has_instruction)
        return ~instruction(~crc, data, length);
#endif
    return ~sliced(~crc, data, length);
}
