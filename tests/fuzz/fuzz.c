#include "fuzz.h"

#include "gmemd/native/crc32c.h"
#include "gmemd/native/memfile.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { GUARD = 2 * FUZZ_PAGE, BIG = 2 * FUZZ_PAGE, BIG_SHIFT = 13, FIRST = GUARD };
enum { SECOND = FIRST + FUZZ_PAGES * FUZZ_PAGE + GUARD, END = SECOND + FUZZ_BIG_PAGES * BIG };

uint64_t fuzz_take(struct fuzz_input *in, unsigned bytes)
{
    uint64_t value = 0;

    for (unsigned i = 0; i < bytes && in->at < in->end; i++)
        value |= (uint64_t)*in->at++ << (8 * i);
    return value;
}

struct fuzz_guest fuzz_guest_new(int populate)
{
    struct gm_region_spec specs[] = {
        {.page_shift = 12, .offset = FIRST, .pages = FUZZ_PAGES},
        {.page_shift = BIG_SHIFT, .offset = SECOND, .pages = FUZZ_BIG_PAGES, .gpa = 1 << 30},
    };
    struct gm_problem problem;
    struct fuzz_guest g = {.file = gm_memfile_memfd("fuzz", END + GUARD, 0, &problem)};

    must(g.file >= 0);
    for (unsigned i = 0; i < 2; i++) {
        specs[i].fd = g.file;
        specs[i].uffd = specs[i].bitmap = -1;
    }
    g.memory = gm_memory_new("fuzz", specs, 2, &problem);
    must(g.memory);
    for (unsigned i = 0; i < 2; i++)
        must(gm_memory_set_populate(g.memory, i, populate, &problem) == 0);
    return g;
}

void fuzz_guest_check(const struct fuzz_guest *g)
{
    static const struct {
        off_t from, to;
    } outside[] = {{0, FIRST}, {SECOND - GUARD, SECOND}, {END, END + GUARD}};

    for (unsigned i = 0; i < 3; i++) {
        off_t data = lseek(g->file, outside[i].from, SEEK_DATA);

        must(data < 0 || data >= outside[i].to);
    }
}

uint32_t fuzz_guest_page(const struct fuzz_guest *g, unsigned region, uint64_t page)
{
    const struct gm_region *r = &g->memory->region[region];
    unsigned char content[BIG];

    must(gm_memfile_read(r->fd, content, gm_bytes(r, 1), gm_file_offset(r, page)) == 0);
    return gm_crc32c(0, content, gm_bytes(r, 1));
}

void fuzz_guest_free(struct fuzz_guest *g)
{
    gm_memory_free(g->memory);
    close(g->file);
}

/* Counts that are in order, and some that are not. */
static struct gm_frame plan(struct fuzz_input *in, int kind)
{
    unsigned choice = (unsigned)fuzz_take(in, 1);
    bool big = choice & 1;
    struct gm_frame f = {.kind = (uint8_t)kind, .region = big};
    uint64_t pages = big ? FUZZ_BIG_PAGES : FUZZ_PAGES;

    f.first = fuzz_take(in, 1) % pages;
    f.count = big ? 1 : (uint32_t)(fuzz_take(in, 1) % 8 + 1);
    if ((choice & 0x1e) == 0x1e)
        f.count = f.first + GM_FRAME_PAGES <= pages && !big ? GM_FRAME_PAGES : 1;
    if (f.first + f.count > pages && choice & 0x60)
        f.first = pages - f.count;
    if (choice >= 0xf0) {
        f.region = (uint16_t)fuzz_take(in, 2);
        f.first = fuzz_take(in, 8);
        f.count = (uint32_t)fuzz_take(in, 4);
    }
    return f;
}

static size_t payload(const struct gm_frame *f)
{
    uint64_t page = f->region ? BIG : FUZZ_PAGE;

    if (f->kind != GM_KIND_PAGES || f->count > GM_FRAME_PAGES || f->count * page > GM_FRAME_PAGES * FUZZ_PAGE)
        return 0;
    return f->count * page;
}

size_t fuzz_frame(struct fuzz_input *in, int kind, int checksum, unsigned char *out)
{
    struct gm_frame f = plan(in, kind);
    unsigned char *content = out + GM_HEADER_BYTES;
    unsigned damage;

    f.length = (uint32_t)payload(&f);
    memset(content, (int)fuzz_take(in, 1), f.length);
    if (checksum) {
        f.flags = GM_FRAME_CRC;
        f.crc = gm_crc32c(0, content, f.length);
    }
    gm_frame_encode(&f, out);
    damage = (unsigned)fuzz_take(in, 1);
    if (damage >= 0xe0 && f.length)
        content[fuzz_take(in, 2) % f.length] ^= 1;
    else if (damage >= 0xd0)
        out[fuzz_take(in, 1) % GM_HEADER_BYTES] ^= (unsigned char)fuzz_take(in, 1);
    return GM_HEADER_BYTES + f.length;
}
