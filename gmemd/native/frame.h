/*
 * What travels on the page lanes, in 32 bytes, little-endian. docs/protocol.md is the specification.
 *
 *      0  u16  magic 0x4d47, "GM"
 *      2  u8   kind
 *      3  u8   flags
 *      4  u16  region
 *      6  u16  0
 *      8  u64  first page
 *     16  u32  pages
 *     20  u32  bytes of payload that follow
 *     24  u32  CRC-32C of the payload, 0 without GM_FRAME_CRC; in a request, how long the latest page was waited for, in µs
 *     28  u32  CRC-32C of bytes 0 to 27, 0 without GM_FRAME_CRC
 *
 * The header has a checksum of its own, so that it still says which pages are to be asked for again when only the payload is damaged.
 */
#ifndef GM_FRAME_H
#define GM_FRAME_H

#include "memory.h"
#include "problem.h"

#include <stdbool.h>
#include <stdint.h>

/* python */
#define GM_HEADER_BYTES 32

enum gm_frame_kind {
    GM_KIND_REQUEST = 1, /* destination to source, urgent lane: send these pages */
    GM_KIND_PAGES = 2,   /* source to destination: their content follows */
    GM_KIND_ZERO = 3,    /* source to destination: they are zero; nothing follows */
    GM_KIND_BEAT = 4,    /* both ways: this end is alive */
};

#define GM_FRAME_CRC 1

struct gm_frame {
    uint64_t first;
    uint32_t count, length, crc;
    uint16_t region;
    uint8_t kind, flags;
};

void gm_frame_encode(const struct gm_frame *frame, unsigned char *out);

/*
 * Reads 32 bytes of the peer's. Returns 0 when every field is within the bounds of `m` and of the direction, else -1 with a problem that
 * names the field; `lane` is for the message. With `checksum`, a header that does not carry its own is damaged, which is the link's
 * fault; the payload's is for the caller to compare.
 */
int gm_frame_decode_untrusted(const unsigned char *in, const struct gm_memory *m, int from_source, int checksum,
                              const char *lane, struct gm_frame *out, struct gm_problem *ret);
/* end python */

#endif
