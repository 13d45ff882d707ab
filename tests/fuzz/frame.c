/* The header of a frame: any 32 bytes are refused with a reason, or name pages of the guest and are what encoding them gives again. */
#include "fuzz.h"

#include "gmemd/native/crc32c.h"

#include <endian.h>
#include <string.h>

enum { SMALL_PAGES = 1000, HUGE_PAGES = 3, CRC_AT = 28 };

static struct gm_memory *guest(void)
{
    static struct gm_memory *memory;
    struct gm_region_spec specs[] = {
        {.fd = -1, .uffd = -1, .bitmap = -1, .page_shift = 12, .pages = SMALL_PAGES},
        {.fd = -1, .uffd = -1, .bitmap = -1, .page_shift = 21, .pages = HUGE_PAGES, .gpa = 1 << 30},
    };
    struct gm_problem problem;

    if (!memory)
        memory = gm_memory_new("fuzz", specs, 2, &problem);
    must(memory);
    return memory;
}

static void check_good(const struct gm_frame *f, int from_source, const unsigned char *header)
{
    const struct gm_region *r = &guest()->region[f->region];
    unsigned char again[GM_HEADER_BYTES];
    struct gm_frame copy = *f;

    if (f->kind == GM_KIND_BEAT) {
        must(!f->region && !f->first && !f->count && !f->length);
    } else {
        must(from_source ? f->kind == GM_KIND_PAGES || f->kind == GM_KIND_ZERO : f->kind == GM_KIND_REQUEST);
        must(f->region < 2 && f->count && f->count <= gm_frame_pages(r));
        must(f->first < r->pages && f->first + f->count <= r->pages);
        must(f->length == (f->kind == GM_KIND_PAGES ? f->count << r->page_shift : 0));
    }
    gm_frame_encode(&copy, again);
    must(memcmp(again, header, CRC_AT) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = {data, data + size};
    unsigned how = (unsigned)fuzz_take(&in, 1);
    unsigned char header[GM_HEADER_BYTES] = {0};
    struct gm_problem problem = {0};
    struct gm_frame f;

    if (size > 1)
        memcpy(header, data + 1, size - 1 < sizeof header ? size - 1 : sizeof header);
    if (how & 4) {
        uint32_t crc = htole32(gm_crc32c(0, header, CRC_AT));

        memcpy(header + CRC_AT, &crc, sizeof crc);
    }
    if (gm_frame_decode_untrusted(header, guest(), how & 1, how & 2, "urgent lane", &f, &problem) == 0) {
        check_good(&f, how & 1, header);
    } else {
        must(problem.blame == GM_PEER || problem.blame == GM_LINK);
        must(problem.text[0] && memchr(problem.text, 0, sizeof problem.text));
    }
    return 0;
}
