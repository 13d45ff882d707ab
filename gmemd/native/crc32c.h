#ifndef GM_CRC32C_H
#define GM_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* python */
/* CRC-32C (Castagnoli) of `length` bytes, going on from `crc` (0 to begin). */
uint32_t gm_crc32c(uint32_t crc, const void *data, size_t length);
/* The same without the CPU's instruction: what other CPUs use, and what the tests compare with. */
uint32_t gm_crc32c_portable(uint32_t crc, const void *data, size_t length);
/* end python */

#endif
