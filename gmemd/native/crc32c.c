/* CRC-32C as in RFC 3720 B.4: reflected polynomial 0x82f63b78, initial value and final xor all ones. */
#include "crc32c.h"

#include <pthread.h>
#include <stdbool.h>
#include <string.h>

enum { SLICES = 8 };

static uint32_t table[SLICES][256];
static bool has_instruction;
static pthread_once_t once = PTHREAD_ONCE_INIT;

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
__attribute__((target("sse4.2"))) static uint32_t instruction(uint32_t crc, const unsigned char *data,
                                                              size_t length)
{
    uint64_t wide = crc;

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
