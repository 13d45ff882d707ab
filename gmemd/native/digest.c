#include "digest.h"

#include "cleanup.h"
#include "crc32c.h"
#include "memfile.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Read at once: stays in the second-level cache, and on any thread's stack. */
enum { PIECE = 32 << 10 };

/* No page has this one. */
enum { LEFT_OUT = 0 };

struct gm_digests {
    int fd;
    size_t size;
    void *map;
    struct gm_region_digests {
        uint32_t *of; /* by page */
        uint32_t zeros; /* that of a page of zeros */
    } region[];
};

static uint32_t digest(uint32_t crc)
{
    return crc == LEFT_OUT ? 1 : crc;
}

static uint32_t of_zeros(uint64_t length)
{
    static const unsigned char zeros[4096];
    uint32_t crc = 0;

    for (; length; length -= sizeof zeros)
        crc = gm_crc32c(crc, zeros, sizeof zeros);
    return digest(crc);
}

void gm_digest_free(struct gm_digests *kept)
{
    if (!kept)
        return;
    if (kept->map != MAP_FAILED)
        munmap(kept->map, kept->size);
    if (kept->fd >= 0)
        close(kept->fd);
    free(kept);
}

/* All of its memory is had at once: a store into it must not fail. */
static int new_file(size_t size, struct gm_problem *ret)
{
    int fd = gm_memfile_memfd("gmemd-digests", size, 0, ret);
    int error = fd < 0 ? 0 : gm_memfile_zero(fd, 0, size);

    if (!error && fd >= 0 && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
        error = -errno;
    if (!error)
        return fd;
    close(fd);
    return gm_blame(ret, GM_KERNEL, -error, "digests of %zu bytes", size);
}

static int known_file(int fd, size_t size, struct gm_problem *ret)
{
    int seals = fcntl(fd, F_GET_SEALS), own;
    struct stat st;

    if (seals < 0 || !(seals & F_SEAL_SHRINK) || fstat(fd, &st) < 0 || (size_t)st.st_size != size)
        return gm_blame(ret, GM_VMM, 0, "not the digests of this memory: no sealed memfd of %zu bytes", size);
    own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    return own < 0 ? gm_blame(ret, GM_KERNEL, errno, "digests") : own;
}

/* What cannot be read by its descriptor is read by its mapping. */
static int map_unreadable(struct gm_memory *m, struct gm_problem *ret)
{
    for (unsigned i = 0; i < m->count; i++) {
        uint64_t page_size;

        if (gm_memfile_kind(m->region[i].fd, &page_size, ret) == GM_GUEST_MEMFD &&
            gm_region_map_alias(&m->region[i], ret) < 0)
            return -1;
    }
    return 0;
}

int gm_digest_keep(struct gm_memory *m, int fd, struct gm_problem *ret)
{
    size_t size = m->pages * sizeof(uint32_t);
    struct gm_digests *none = NULL, *kept;
    uint32_t *at;

    if (atomic_load(&m->digests))
        return 0;
    kept = calloc(1, sizeof *kept + m->count * sizeof kept->region[0]);
    if (!kept)
        return gm_blame(ret, GM_KERNEL, ENOMEM, "digests");
    kept->map = MAP_FAILED;
    kept->size = size;
    kept->fd = fd < 0 ? new_file(size, ret) : known_file(fd, size, ret);
    if (kept->fd >= 0) {
        kept->map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, kept->fd, 0);
        if (kept->map == MAP_FAILED)
            gm_blame(ret, GM_KERNEL, errno, "digests of %zu bytes", size);
    }
    if (kept->map == MAP_FAILED || map_unreadable(m, ret) < 0) {
        gm_digest_free(kept);
        return -1;
    }
    at = kept->map;
    for (unsigned i = 0; i < m->count; i++) {
        kept->region[i] = (struct gm_region_digests){at, of_zeros(gm_bytes(&m->region[i], 1))};
        at += m->region[i].pages;
    }
    if (!atomic_compare_exchange_strong(&m->digests, &none, kept))
        gm_digest_free(kept);
    return 0;
}

int gm_digest_fd(const struct gm_memory *m)
{
    const struct gm_digests *kept = atomic_load(&m->digests);

    return kept ? kept->fd : -1;
}

/* Several base pages at once, or one huge page piece by piece. */
static int read_some(const struct gm_region *r, uint64_t first, unsigned count, uint32_t *out)
{
    unsigned char piece[PIECE];
    uint64_t page = gm_bytes(r, 1), end = gm_bytes(r, first + count);
    uint32_t crc = 0;

    for (uint64_t at = gm_bytes(r, first), here; at < end; at += here) {
        int error;

        here = end - at < PIECE ? end - at : PIECE;
        error = gm_region_read(r, at, here, piece);
        if (error)
            return error;
        for (uint64_t in = 0, some; in < here; in += some) {
            some = page < here - in ? page : here - in;
            crc = gm_crc32c(crc, piece + in, some);
            if ((at + in + some) % page == 0) {
                *out++ = digest(crc);
                crc = 0;
            }
        }
    }
    return 0;
}

int gm_digest_read(const struct gm_memory *m, unsigned region, uint64_t first, unsigned count, uint32_t *out,
                   struct gm_problem *ret)
{
    int error = read_some(&m->region[region], first, count, out);

    if (error)
        return gm_blame(ret, GM_VMM, -error, "region %u: pages %llu to %llu cannot be read", region,
                        (unsigned long long)first, (unsigned long long)(first + count - 1));
    return 0;
}

void gm_digest_make(struct gm_digest_frame *frame, const struct gm_memory *m, const struct gm_region *r, uint64_t first,
                    uint64_t mask, bool hole)
{
    unsigned run;

    frame->kept = atomic_load_explicit(&m->digests, memory_order_acquire);
    if (!frame->kept)
        return;
    for (unsigned at = 0; (run = gm_mask_run(mask, &at)); at += run) {
        /* Its VMM may have cut the file short: then nothing is known of what it had. */
        bool read = !hole && read_some(r, first + at, run, frame->of + at) == 0;

        for (unsigned i = at; !read && i < at + run; i++)
            frame->of[i] = hole ? frame->kept->region[r->index].zeros : LEFT_OUT;
    }
}

void gm_digest_put(const struct gm_digest_frame *frame, const struct gm_region *r, uint64_t first, uint64_t mask)
{
    for (unsigned i = 0; frame->kept && mask; i++, mask >>= 1)
        if (mask & 1)
            frame->kept->region[r->index].of[first + i] = frame->of[i];
}

void gm_digest_leave_out(const struct gm_memory *m, const struct gm_region *r, uint64_t first, uint64_t mask)
{
    struct gm_digest_frame none = {.kept = atomic_load_explicit(&m->digests, memory_order_acquire)};

    gm_digest_put(&none, r, first, mask);
}

void gm_digest_compare(const struct gm_memory *m, unsigned region, uint64_t first, unsigned count,
                       const uint32_t *theirs, struct gm_verdict *total)
{
    const struct gm_digests *kept = atomic_load(&m->digests);

    for (unsigned i = 0; i < count; i++) {
        uint32_t ours = kept ? kept->region[region].of[first + i] : LEFT_OUT;

        if (ours == LEFT_OUT) {
            total->left_out++;
            continue;
        }
        total->verified++;
        if (ours != theirs[i] && !total->mismatches++) {
            total->region = region;
            total->page = first + i;
        }
    }
}
