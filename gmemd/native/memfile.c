/*
 * guest_memfd has no read() and, on released kernels, no write(); its llseek, where it has one, knows nothing of holes. Everything
 * here that would need them says so instead of guessing.
 *
 * tmpfs mounted with huge=within_size or huge=always, and memfds where the host's shmem_enabled says so, bring in 2 MiB at once when
 * a single page is written: the rest of it is zeroed, present, and no more received than before. Their st_blksize tells.
 */
#include "memfile.h"

#include "cleanup.h"
#include "guard.h"
#include "uapi.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <linux/memfd.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

/* A filesystem of KVM's own; guest_memfd files were anonymous inodes before they had it (v6.18 still). */
#ifndef GUEST_MEMFD_MAGIC
#define GUEST_MEMFD_MAGIC 0x474d454d
#endif

enum { BASE_PAGE = 4096 };

static int taken(int *fd)
{
    int out = *fd;

    *fd = -1;
    return out;
}

int gm_memfile_memfd(const char *name, uint64_t size, uint64_t huge_page, struct gm_problem *ret)
{
    unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
    gm_auto_fd fd = -1;

    if (huge_page)
        flags |= MFD_HUGETLB | (unsigned)__builtin_ctzll(huge_page) << MFD_HUGE_SHIFT;
    fd = memfd_create(name, flags);
    if (fd < 0)
        return gm_blame(ret, GM_KERNEL, errno, "memfd: pages of %llu bytes",
                        (unsigned long long)(huge_page ? huge_page : BASE_PAGE));
    if (ftruncate(fd, (off_t)size) < 0)
        return gm_blame(ret, GM_KERNEL, errno, "memfd: %llu bytes", (unsigned long long)size);
    return taken(&fd);
}

int gm_memfile_guest_memfd(uint64_t size, uint64_t flags, struct gm_problem *ret)
{
    struct kvm_create_guest_memfd request = {.size = size, .flags = flags};
    gm_auto_fd kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    gm_auto_fd machine = kvm < 0 ? -1 : ioctl(kvm, KVM_CREATE_VM, 0);
    int fd;

    if (machine < 0)
        return gm_blame(ret, GM_KERNEL, errno, "guest_memfd: no virtual machine from /dev/kvm");
    fd = ioctl(machine, KVM_CREATE_GUEST_MEMFD, &request);
    if (fd < 0)
        return gm_blame(ret, GM_KERNEL, errno, "guest_memfd: %llu bytes, flags %#llx",
                        (unsigned long long)size, (unsigned long long)flags);
    fcntl(fd, F_SETFD, FD_CLOEXEC); /* the kernel gives it without */
    return fd;
}

static bool is_guest_memfd(int fd)
{
    static const char anonymous[] = "anon_inode:[kvm-gmem]";
    char path[32], name[sizeof anonymous];
    struct statfs fs;

    if (fstatfs(fd, &fs) == 0 && fs.f_type == GUEST_MEMFD_MAGIC)
        return true;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return readlink(path, name, sizeof name) == sizeof anonymous - 1 &&
           memcmp(name, anonymous, sizeof anonymous - 1) == 0;
}

int gm_memfile_kind(int fd, uint64_t *page_size, struct gm_problem *ret)
{
    struct statfs fs;
    struct stat st;

    *page_size = BASE_PAGE;
    if (fstat(fd, &st) < 0 || fstatfs(fd, &fs) < 0)
        return gm_blame(ret, GM_KERNEL, errno, "descriptor %d", fd);
    if (is_guest_memfd(fd))
        return GM_GUEST_MEMFD;
    if (!S_ISREG(st.st_mode))
        return gm_blame(ret, GM_VMM, 0, "not a memory file (mode %o)", st.st_mode);
    if (fs.f_type == HUGETLBFS_MAGIC) {
        *page_size = (uint64_t)fs.f_bsize;
        return GM_HUGETLB;
    }
    return fs.f_type == TMPFS_MAGIC ? GM_SHMEM : GM_FILE;
}

int gm_memfile_large_folios(int fd)
{
    struct gm_problem problem;
    uint64_t page_size;
    struct stat st;

    return gm_memfile_kind(fd, &page_size, &problem) == GM_SHMEM && fstat(fd, &st) == 0 && st.st_blksize > BASE_PAGE;
}

/* guest_memfd knows no SEEK_DATA: asks mincore() about a mapping, piece by piece. */
static int empty_by_mincore(int fd, uint64_t offset, uint64_t length)
{
    enum { PIECE = 64 << 20 };
    static const size_t pages = PIECE / BASE_PAGE;
    gm_auto_free unsigned char *present = malloc(pages);
    int empty = 1;

    for (uint64_t at = 0; present && empty == 1 && at < length; at += PIECE) {
        size_t here = length - at < PIECE ? (size_t)(length - at) : PIECE;
        void *map = mmap(NULL, here, PROT_READ, MAP_SHARED, fd, (off_t)(offset + at));

        if (map == MAP_FAILED)
            return -1;
        if (mincore(map, here, present) < 0)
            empty = -1;
        for (size_t i = 0; empty == 1 && i < here / BASE_PAGE; i++)
            if (present[i] & 1)
                empty = 0;
        munmap(map, here);
    }
    return present ? empty : -1;
}

/* hugetlbfs calls everything data, and counts its blocks; mincore() there sees only what this mapping has touched. */
static int empty_by_blocks(int fd)
{
    struct stat st;

    return fstat(fd, &st) < 0 ? -1 : st.st_blocks == 0;
}

int gm_memfile_empty(int fd, uint64_t offset, uint64_t length)
{
    struct gm_problem problem;
    uint64_t page_size;
    int kind = gm_memfile_kind(fd, &page_size, &problem);
    off_t data;

    if (kind == GM_GUEST_MEMFD)
        return empty_by_mincore(fd, offset, length);
    if (kind == GM_HUGETLB)
        return empty_by_blocks(fd);
    data = lseek(fd, (off_t)offset, SEEK_DATA);
    if (data < 0)
        return errno == ENXIO ? 1 : -1;
    return (uint64_t)data >= offset + length;
}

int gm_memfile_shown(int fd, uint64_t offset)
{
    void *map = mmap(NULL, BASE_PAGE, PROT_READ, MAP_SHARED, fd, (off_t)offset);
    char byte;
    int error;

    if (map == MAP_FAILED)
        return -errno;
    madvise(map, BASE_PAGE, MADV_NOHUGEPAGE);
    error = gm_guarded_load(&byte, map, sizeof byte);
    munmap(map, BASE_PAGE);
    return error ? error : gm_memfile_punch(fd, offset, BASE_PAGE);
}

static bool ends_before(int fd, uint64_t end)
{
    struct stat st;

    return fstat(fd, &st) < 0 || (uint64_t)st.st_size < end;
}

int gm_memfile_data(int fd, uint64_t from, uint64_t end, uint64_t *out)
{
    off_t data = lseek(fd, (off_t)from, SEEK_DATA);
    off_t hole;

    out[0] = from;
    out[1] = end;
    if (data < 0 && errno == ENXIO && !ends_before(fd, end))
        return 0;
    if (data < 0 || is_guest_memfd(fd))
        return from < end;
    out[0] = (uint64_t)data;
    if (out[0] >= end)
        return 0;
    hole = lseek(fd, data, SEEK_HOLE);
    if (hole > data && (uint64_t)hole < end)
        out[1] = (uint64_t)hole;
    return 1;
}

static int allocate(int fd, int mode, uint64_t offset, uint64_t length)
{
    int result;

    do
        result = fallocate(fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length);
    while (result < 0 && errno == EINTR);
    return result < 0 ? -errno : 0;
}

int gm_memfile_zero(int fd, uint64_t offset, uint64_t length)
{
    return allocate(fd, 0, offset, length);
}

int gm_memfile_punch(int fd, uint64_t offset, uint64_t length)
{
    return allocate(fd, FALLOC_FL_PUNCH_HOLE, offset, length);
}

int gm_memfile_write(int fd, const void *from, size_t length, uint64_t offset)
{
    while (length) {
        ssize_t put = pwrite(fd, from, length, (off_t)offset);

        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            return put < 0 ? -errno : -EIO;
        from = (const char *)from + put;
        offset += (uint64_t)put;
        length -= (size_t)put;
    }
    return 0;
}

int gm_memfile_read(int fd, void *to, size_t length, uint64_t offset)
{
    while (length) {
        ssize_t got = pread(fd, to, length, (off_t)offset);

        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got < 0 ? -errno : -ENODATA;
        to = (char *)to + got;
        offset += (uint64_t)got;
        length -= (size_t)got;
    }
    return 0;
}

bool gm_is_zero(const void *data, size_t length)
{
    const uint64_t *words = data;

    for (size_t i = 0; i < length / sizeof *words; i += 8) {
        uint64_t any = 0;

        for (size_t j = 0; j < 8; j++)
            any |= words[i + j];
        if (any)
            return false;
    }
    return true;
}
