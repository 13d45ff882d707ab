#include "frame.h"

#include "crc32c.h"

#include <endian.h>
#include <string.h>

enum { MAGIC = 0x4d47, HEADER_CRC_AT = 28 };

struct wire {
    uint16_t magic;
    uint8_t kind, flags;
    uint16_t region, reserved;
    uint64_t first;
    uint32_t count, length, crc, header_crc;
};

_Static_assert(sizeof(struct wire) == GM_HEADER_BYTES, "the header is 32 bytes");

void gm_frame_encode(const struct gm_frame *frame, unsigned char *out)
{
    struct wire wire = {
        .magic = htole16(MAGIC),
        .kind = frame->kind,
        .flags = frame->flags,
        .region = htole16(frame->region),
        .first = htole64(frame->first),
        .count = htole32(frame->count),
        .length = htole32(frame->length),
        .crc = htole32(frame->crc),
    };

    if (frame->flags & GM_FRAME_CRC)
        wire.header_crc = htole32(gm_crc32c(0, &wire, HEADER_CRC_AT));
    memcpy(out, &wire, sizeof wire);
}

static int check_pages(const struct gm_frame *f, const struct gm_memory *m, const char *lane, const char *peer,
                       struct gm_problem *ret)
{
    const struct gm_region *r;

    if (f->region >= m->count)
        return gm_blame(ret, GM_PEER, 0, "%s: region %u of %u: sent by the %s", lane, f->region, m->count, peer);
    r = &m->region[f->region];
    if (f->count == 0 || f->count > gm_frame_pages(r))
        return gm_blame(ret, GM_PEER, 0, "%s: a frame of %u pages of region %u (1 to %u may be): sent by the %s", lane,
                        f->count, f->region, gm_frame_pages(r), peer);
    if (f->first >= r->pages || f->count > r->pages - f->first)
        return gm_blame(ret, GM_PEER, 0, "%s: page %llu outside region %u (%llu pages): sent by the %s", lane,
                        (unsigned long long)(f->first >= r->pages ? f->first : f->first + f->count - 1),
                        f->region, (unsigned long long)r->pages, peer);
    return 0;
}

static int check_length(const struct gm_frame *f, const struct gm_memory *m, const char *lane, const char *peer,
                        struct gm_problem *ret)
{
    uint64_t length = f->kind == GM_KIND_PAGES ? gm_bytes(&m->region[f->region], f->count) : 0;

    if (f->length != length)
        return gm_blame(ret, GM_PEER, 0, "%s: %u bytes for %u pages of region %u (%llu expected): sent by the %s", lane,
                        f->length, f->count, f->region, (unsigned long long)length, peer);
    return 0;
}

int gm_frame_decode_untrusted(const unsigned char *in, const struct gm_memory *m, int from_source, int checksum,
                              const char *lane, struct gm_frame *out, struct gm_problem *ret)
{
    const char *peer = from_source ? "source" : "destination";
    struct wire wire;

    memcpy(&wire, in, sizeof wire);
    *out = (struct gm_frame){
        .kind = wire.kind,
        .flags = wire.flags,
        .region = le16toh(wire.region),
        .first = le64toh(wire.first),
        .count = le32toh(wire.count),
        .length = le32toh(wire.length),
        .crc = le32toh(wire.crc),
    };
    if (checksum && (!(out->flags & GM_FRAME_CRC) || le32toh(wire.header_crc) != gm_crc32c(0, in, HEADER_CRC_AT)))
        return gm_blame(ret, GM_LINK, 0, "%s: a damaged header", lane);
    if (le16toh(wire.magic) != MAGIC)
        return gm_blame(ret, GM_PEER, 0, "%s: no frame begins with 0x%04x: sent by the %s", lane,
                        le16toh(wire.magic), peer);
    if (out->flags & ~GM_FRAME_CRC)
        return gm_blame(ret, GM_PEER, 0, "%s: frame with unknown flags %#x: sent by the %s", lane, out->flags,
                        peer);
    if (wire.reserved)
        return gm_blame(ret, GM_PEER, 0, "%s: frame with %#x in its reserved bytes: sent by the %s", lane,
                        le16toh(wire.reserved), peer);
    if (out->kind == GM_KIND_BEAT) {
        if (out->region || out->first || out->count || out->length)
            return gm_blame(ret, GM_PEER, 0, "%s: a beat that names pages: sent by the %s", lane, peer);
        return 0;
    }
    if (from_source ? out->kind != GM_KIND_PAGES && out->kind != GM_KIND_ZERO : out->kind != GM_KIND_REQUEST)
        return gm_blame(ret, GM_PEER, 0, "%s: frame of kind %u: sent by the %s", lane, out->kind, peer);
    if (check_pages(out, m, lane, peer, ret) < 0)
        return -1;
    return check_length(out, m, lane, peer, ret);
}
