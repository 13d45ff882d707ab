#include "memory.h"

#include "cleanup.h"
#include "digest.h"
#include "guard.h"
#include "memfile.h"
#include "memory_layout.h"
#include "uffd.h"
#include "userfault.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

const char gm_state_magic[8] = "GMSTATE";

static size_t bitmap_bytes(uint64_t pages)
{
    return gm_bitmap_words(pages) * sizeof(gm_word);
}

static size_t state_size(const struct gm_region_spec *specs, unsigned count)
{
    size_t size = sizeof(struct gm_state) + count * sizeof(struct gm_state_region);

    for (unsigned i = 0; i < count; i++)
        size += 2 * bitmap_bytes(specs[i].pages);
    return size + GM_MESSAGES * GM_MESSAGE_BYTES;
}

static void describe(struct gm_state *state, const char *migration, const struct gm_region_spec *specs,
                     unsigned count)
{
    size_t at = sizeof *state + count * sizeof(struct gm_state_region);

    for (unsigned i = 0; i < count; i++) {
        state->region[i] = (struct gm_state_region){
            .offset = specs[i].offset,
            .pages = specs[i].pages,
            .gpa = specs[i].gpa,
            .hva = specs[i].hva,
            .page_shift = specs[i].page_shift,
            .file_name = specs[i].file_name,
            .uffd_name = specs[i].uffd_name,
            .has_bitmap = specs[i].bitmap >= 0,
            .bitmap_name = specs[i].bitmap_name,
            .bitmap_offset = specs[i].bitmap_offset,
            .claimed_at = at,
            .received_at = at + bitmap_bytes(specs[i].pages),
        };
        at += 2 * bitmap_bytes(specs[i].pages);
    }
    strncpy(state->migration, migration, GM_ID_BYTES - 1);
    state->messages_at = at;
    state->size = at + GM_MESSAGES * GM_MESSAGE_BYTES;
    state->regions = count;
    state->version = GM_STATE_VERSION;
    memcpy(state->magic, gm_state_magic, sizeof state->magic);
}

void gm_memory_bind(struct gm_memory *m, unsigned index, int fd, int uffd)
{
    const struct gm_state_region *known = &m->state->region[index];

    m->region[index] = (struct gm_region){
        .index = index,
        .fd = fd,
        .uffd = uffd,
        .populate = (enum gm_populate)known->populate,
        .page_shift = known->page_shift,
        .offset = known->offset,
        .pages = known->pages,
        .gpa = known->gpa,
        .hva = known->hva,
        .claimed = (gm_word *)((char *)m->state + known->claimed_at),
        .received = (gm_word *)((char *)m->state + known->received_at),
    };
    m->pages += known->pages;
}

struct gm_memory *gm_memory_around(struct gm_state *state, struct gm_problem *ret)
{
    struct gm_memory *m = calloc(1, sizeof *m + state->regions * sizeof m->region[0]);

    if (!m) {
        gm_blame(ret, GM_KERNEL, ENOMEM, "memory of %u regions", state->regions);
        munmap(state, state->size);
        return NULL;
    }
    m->state = state;
    m->state_fd = -1;
    m->count = state->regions;
    m->messages = (char *)state + state->messages_at;
    if (!state->messages_at)
        m->messages = m->own_messages = calloc(GM_MESSAGES, GM_MESSAGE_BYTES);
    if (!m->messages) {
        gm_blame(ret, GM_KERNEL, ENOMEM, "memory of %u regions", state->regions);
        gm_memory_free(m);
        return NULL;
    }
    return m;
}

/* A new state, sealed against changes of its size, with everything in it but what pages are received. */
static struct gm_state *new_state(int fd, const char *migration, const struct gm_region_spec *specs,
                                  unsigned count, struct gm_problem *ret)
{
    size_t size = state_size(specs, count);
    struct gm_state *state = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    if (state == MAP_FAILED || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0) {
        gm_blame(ret, GM_KERNEL, errno, "state of %zu bytes", size);
        if (state != MAP_FAILED)
            munmap(state, size);
        return NULL;
    }
    describe(state, migration, specs, count);
    return state;
}

struct gm_memory *gm_memory_new(const char *migration, const struct gm_region_spec *specs, unsigned count,
                                struct gm_problem *ret)
{
    gm_auto_fd fd = gm_memfile_memfd("gmemd-state", state_size(specs, count), 0, ret);
    struct gm_state *state = fd < 0 ? NULL : new_state(fd, migration, specs, count, ret);
    struct gm_memory *m = state ? gm_memory_around(state, ret) : NULL;

    if (!m)
        return NULL;
    m->state_fd = fd;
    fd = -1;
    for (unsigned i = 0; i < count; i++) {
        gm_memory_bind(m, i, specs[i].fd, specs[i].uffd);
        if (specs[i].bitmap >= 0 && gm_userfault_map(&m->region[i], specs[i].bitmap, specs[i].bitmap_offset, ret) < 0) {
            gm_memory_free(m);
            return NULL;
        }
    }
    return m;
}

void gm_memory_free(struct gm_memory *m)
{
    if (!m)
        return;
    for (unsigned i = 0; i < m->count; i++) {
        struct gm_region *r = &m->region[i];

        if (r->alias)
            munmap(r->alias, gm_bytes(r, r->pages));
        if (r->singles)
            munmap(r->singles, gm_bytes(r, r->pages));
        gm_userfault_unmap(r);
    }
    munmap(m->state, m->state->size);
    if (m->state_fd >= 0)
        close(m->state_fd);
    free(m->stages);
    gm_digest_free(m->digests);
    free(m->own_messages);
    free(m);
}

int gm_memory_time_stages(struct gm_memory *m, struct gm_problem *ret)
{
    m->stages = calloc(1, sizeof *m->stages);
    return m->stages ? 0 : gm_blame(ret, GM_KERNEL, ENOMEM, "stamps of faults");
}

unsigned gm_memory_stages(struct gm_memory *m, struct gm_stamp *out, unsigned most)
{
    return m->stages ? gm_stages_read(m->stages, out, most) : 0;
}

uint64_t gm_memory_note(const struct gm_memory *m, int note)
{
    return atomic_load(&m->state->note[note]);
}

void gm_memory_set_note(struct gm_memory *m, int note, uint64_t value)
{
    atomic_store(&m->state->note[note], value);
}

const char *gm_memory_migration(const struct gm_memory *m)
{
    return m->state->migration;
}

unsigned gm_memory_regions(const struct gm_memory *m)
{
    return m->count;
}

void gm_memory_region(const struct gm_memory *m, unsigned region, struct gm_region_spec *out, int *populate)
{
    const struct gm_state_region *known = &m->state->region[region];

    *out = (struct gm_region_spec){
        .fd = m->region[region].fd,
        .uffd = m->region[region].uffd,
        .bitmap = known->has_bitmap ? 0 : -1,
        .bitmap_name = known->bitmap_name,
        .bitmap_offset = known->bitmap_offset,
        .file_name = known->file_name,
        .uffd_name = known->uffd_name,
        .offset = known->offset,
        .pages = known->pages,
        .gpa = known->gpa,
        .hva = known->hva,
        .page_shift = known->page_shift,
    };
    *populate = (int)known->populate;
}

int gm_memory_state_fd(const struct gm_memory *m)
{
    return m->state_fd;
}

uint64_t gm_memory_pages(const struct gm_memory *m)
{
    return m->pages;
}

uint64_t gm_memory_received(const struct gm_memory *m)
{
    return atomic_load(&m->received);
}

static int map_file(const struct gm_region *r, unsigned char *_Atomic *where, struct gm_problem *ret)
{
    size_t size = gm_bytes(r, r->pages);
    unsigned char *none = NULL;
    void *map;

    if (atomic_load(where))
        return 0;
    map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, r->fd, (off_t)r->offset);
    if (map == MAP_FAILED)
        return gm_blame(ret, GM_VMM, errno, "region %u: its memory file cannot be mapped", r->index);
    /* Guest memory has no place in a core dump. */
    madvise(map, size, MADV_DONTDUMP);
    /* Two lanes may come here at once. */
    if (!atomic_compare_exchange_strong(where, &none, map))
        munmap(map, size);
    return 0;
}

int gm_region_map_alias(struct gm_region *r, struct gm_problem *ret)
{
    return map_file(r, &r->alias, ret);
}

int gm_region_map(struct gm_region *r, struct gm_problem *ret)
{
    if (r->populate != GM_POPULATE_WRITE)
        return gm_region_map_alias(r, ret);
    if (!gm_memfile_large_folios(r->fd))
        return 0;
    if (map_file(r, &r->singles, ret) < 0)
        return -1;
    /* Refused where there are no huge pages at all, and then there is nothing to keep away. */
    madvise(r->singles, gm_bytes(r, r->pages), MADV_NOHUGEPAGE);
    return 0;
}

int gm_region_read(const struct gm_region *r, uint64_t at, size_t length, void *to)
{
    const unsigned char *alias = atomic_load(&r->alias);

    return alias ? gm_guarded_load(to, alias + at, length) : gm_memfile_read(r->fd, to, length, r->offset + at);
}

int gm_memory_map(struct gm_memory *m, unsigned region, struct gm_problem *ret)
{
    return gm_region_map_alias(&m->region[region], ret);
}

int gm_memory_set_populate(struct gm_memory *m, unsigned region, int populate, struct gm_problem *ret)
{
    struct gm_region *r = &m->region[region];

    r->populate = (enum gm_populate)populate;
    if (gm_region_map(r, ret) < 0)
        return -1;
    m->state->region[region].populate = (uint32_t)populate;
    return 0;
}

int gm_memory_register(struct gm_memory *m, struct gm_problem *ret)
{
    int modes = GM_UFFD_MISSING | GM_UFFD_MINOR;

    for (unsigned i = 0; i < m->count; i++) {
        const struct gm_region *r = &m->region[i];
        struct gm_problem why;
        int got = gm_uffd_register(r->uffd, r->hva, gm_bytes(r, r->pages), &why);

        if (got < 0)
            return gm_blame_in(ret, &why, "region %u", i);
        modes &= got;
    }
    gm_memory_set_note(m, GM_NOTE_TRAP, (uint64_t)modes);
    return modes;
}

static int each_region(struct gm_memory *m, int (*call)(int, uint64_t, uint64_t), const char *what,
                       struct gm_problem *ret)
{
    int failed = 0;

    for (unsigned i = 0; i < m->count; i++) {
        const struct gm_region *r = &m->region[i];
        int error = call(r->uffd, r->hva, gm_bytes(r, r->pages));

        if (error)
            failed = gm_blame(ret, GM_VMM, -error, "region %u: %s", i, what);
    }
    return failed;
}

int gm_memory_unregister(struct gm_memory *m, struct gm_problem *ret)
{
    if (each_region(m, gm_uffd_unregister, "unregister", ret) < 0)
        return -1;
    for (unsigned i = 0; i < m->count; i++) {
        const struct gm_region *r = &m->region[i];

        /* It takes its time; the caller has others to serve, and comes again. */
        if (gm_uffd_drain(r->uffd, r->hva, gm_bytes(r, r->pages)) == -EAGAIN)
            return 1;
    }
    return 0;
}

int gm_memory_wake(struct gm_memory *m, struct gm_problem *ret)
{
    return each_region(m, gm_uffd_wake, "wake", ret);
}

struct gm_region *gm_memory_find(struct gm_memory *m, uint64_t hva)
{
    for (unsigned i = 0; i < m->count; i++)
        if (hva - m->region[i].hva < gm_bytes(&m->region[i], m->region[i].pages))
            return &m->region[i];
    return NULL;
}

struct gm_region *gm_memory_find_guest(struct gm_memory *m, uint64_t gpa)
{
    for (unsigned i = 0; i < m->count; i++)
        if (gpa - m->region[i].gpa < gm_bytes(&m->region[i], m->region[i].pages))
            return &m->region[i];
    return NULL;
}

uint64_t gm_region_clip(const struct gm_region *r, uint64_t start, uint64_t end, uint64_t *first)
{
    uint64_t region_end = r->hva + gm_bytes(r, r->pages), last;
    uint64_t from = start > r->hva ? start : r->hva, to = end < region_end ? end : region_end;

    *first = (from - r->hva + gm_bytes(r, 1) - 1) >> r->page_shift;
    last = (to - r->hva) >> r->page_shift;
    return from < to && *first < last ? last - *first : 0;
}

unsigned gm_memory_runs(const struct gm_memory *m, unsigned region, int bitmap, uint64_t *from, uint64_t *pairs,
                        unsigned most)
{
    const struct gm_region *r = &m->region[region];
    const gm_word *bits = bitmap == GM_CLAIMED ? r->claimed : r->received;
    unsigned n = 0;

    while (n < most) {
        uint64_t first = gm_bitmap_find(bits, *from, r->pages, true);

        *from = gm_bitmap_find(bits, first, r->pages, false);
        if (first == r->pages)
            break;
        pairs[2 * n] = first;
        pairs[2 * n + 1] = *from - first;
        n++;
    }
    return n;
}
