/*
 * Memory files: making the page that the probes play with, and filling it.
 *
 * A page that the kernel will not give (guest_memfd without INIT_SHARED, an empty hugetlb pool, a
 * poisoned page) kills who touches it with SIGBUS. So nothing here touches such a page from user
 * space first: the kernel does it for us in send and recv, where the same failure is EFAULT. It is
 * also the kind of fault that matters, for KVM's faults are the kernel's, too.
 */
#include "probe.h"

#include "cleanup.h"
#include "probe_arena.h"
#include "uapi.h"

#include <fcntl.h>
#include <linux/memfd.h>
#include <stdbool.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define HUGE_PAGE ((size_t)2 << 20)
/* A UNIX socket takes this much in one go whatever its limits are. */
#define TRANSFER_CHUNK ((size_t)4096)
#define CLOCK_READINGS 1000
/* The best of so many rounds: a round that was preempted does not count. */
#define CLOCK_ROUNDS 10

static int make_guest_memfd(struct gm_arena *arena, uint64_t flags, const char **step)
{
    int file;

    arena->vm = gm_probe_make_vm(step);
    if (arena->vm < 0)
        return -1;
    flags |= GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED;
    file = gm_probe_make_guest_memfd(arena->vm, arena->page, flags | GUEST_MEMFD_FLAG_WRITE, step);
    if (file < 0)
        file = gm_probe_make_guest_memfd(arena->vm, arena->page, flags, step);
    return file;
}

static int make_file(struct gm_arena *arena, int backing, const char **step)
{
    unsigned huge = backing == GM_PROBE_HUGETLB ? MFD_HUGETLB | MFD_HUGE_2MB : 0;
    int file;

    if (backing == GM_PROBE_GUEST_MEMFD)
        return make_guest_memfd(arena, 0, step);
    if (backing == GM_PROBE_NO_DIRECT_MAP)
        return make_guest_memfd(arena, GUEST_MEMFD_FLAG_NO_DIRECT_MAP, step);
    *step = "memfd_create";
    file = memfd_create("gmemd-probe", MFD_CLOEXEC | huge);
    if (file < 0)
        return -1;
    *step = "ftruncate";
    if (ftruncate(file, (off_t)arena->page) == 0)
        return file;
    gm_close_fd(&file);
    return -1;
}

static char *map_with(const struct gm_arena *arena, int file, int flags)
{
    void *mapping = mmap(NULL, arena->page, PROT_READ | PROT_WRITE, flags, file, 0);

    return mapping == MAP_FAILED ? NULL : mapping;
}

/* Registering can be tried on an empty hugetlb pool, too: only the reservation fails there. */
static char *map_page(struct gm_arena *arena, int file)
{
    char *mapping = map_with(arena, file, file < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED);

    if (mapping || file < 0 || errno != ENOMEM)
        return mapping;
    arena->no_memory = errno;
    return map_with(arena, file, MAP_SHARED | MAP_NORESERVE);
}

struct gm_trial gm_arena_open(struct gm_arena *arena, int backing)
{
    const char *step = "";

    arena->page = backing == GM_PROBE_HUGETLB ? HUGE_PAGE : (size_t)sysconf(_SC_PAGESIZE);
    if (backing != GM_PROBE_ANONYMOUS) {
        arena->file = make_file(arena, backing, &step);
        if (arena->file < 0)
            return gm_trial_untried(step, errno);
        arena->alias = map_page(arena, arena->file);
        if (!arena->alias)
            return gm_trial_untried("mmap", errno);
    }
    arena->range = map_page(arena, arena->file);
    arena->content = map_page(arena, -1);
    if (!arena->range || !arena->content)
        return gm_trial_untried("mmap", errno);
    memset(arena->content, GM_PROBE_FILL, arena->page);
    return gm_trial_yes(0);
}

void gm_arena_close(struct gm_arena *arena)
{
    char *mappings[] = {arena->range, arena->alias, arena->content};

    gm_arena_drop_uffd(arena);
    for (unsigned i = 0; i < sizeof mappings / sizeof mappings[0]; i++)
        if (mappings[i])
            munmap(mappings[i], arena->page);
    gm_close_fd(&arena->file);
    gm_close_fd(&arena->vm);
}

int gm_probe_transfer(void *to, const void *from, size_t length)
{
    int ends[2];

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0)
        return errno;
    gm_auto_fd in = ends[0];
    gm_auto_fd out = ends[1];

    for (size_t done = 0; done < length;) {
        size_t rest = length - done;
        ssize_t sent = send(in, (const char *)from + done,
                            rest < TRANSFER_CHUNK ? rest : TRANSFER_CHUNK, MSG_NOSIGNAL);

        if (sent < 0)
            return errno;
        ssize_t got = recv(out, (char *)to + done, (size_t)sent, MSG_WAITALL);

        if (got != sent)
            return got < 0 ? errno : EIO;
        done += (size_t)sent;
    }
    return 0;
}

int gm_arena_fill(const struct gm_arena *arena)
{
    if (arena->no_memory)
        return arena->no_memory;
    return gm_probe_transfer(arena->alias, arena->content, arena->page);
}

/* Whether the whole page holds the content. */
static bool is_filled(const struct gm_arena *arena)
{
    char first;

    return gm_probe_transfer(&first, arena->range, 1) == 0 &&
           memcmp(arena->range, arena->content, arena->page) == 0;
}

static struct gm_trial by_write(const struct gm_arena *arena)
{
    ssize_t done = pwrite(arena->file, arena->content, arena->page, 0);

    if (done < 0)
        return gm_trial_no("pwrite", errno);
    if (done != (ssize_t)arena->page || !is_filled(arena))
        return gm_trial_no("pwrite took the page, but the content is not in it", 0);
    return gm_trial_yes(pwrite(arena->file, arena->content, arena->page, 0) < 0 ? errno : 0);
}

static struct gm_trial by_recv(const struct gm_arena *arena)
{
    int error = gm_arena_fill(arena);

    if (error)
        return gm_trial_no("recv into the alias", error);
    return is_filled(arena) ? gm_trial_yes(0) : gm_trial_no("the content is not in the page", 0);
}

static struct gm_trial by_copy(const struct gm_arena *arena)
{
    int error = gm_probe_transfer(arena->alias, arena->content, 1);

    if (error)
        return gm_trial_no("first touch of the alias", error);
    memcpy(arena->alias, arena->content, arena->page);
    return is_filled(arena) ? gm_trial_yes(0) : gm_trial_no("the content is not in the page", 0);
}

struct gm_trial gm_probe_populate(int backing, int how)
{
    gm_auto_arena arena = GM_NO_ARENA;
    struct gm_trial opened = gm_arena_open(&arena, backing);

    if (opened.ok != 1)
        return opened;
    if (arena.no_memory)
        return gm_trial_no_page(&arena, arena.no_memory);
    switch (how) {
    case GM_PROBE_BY_WRITE:
        return by_write(&arena);
    case GM_PROBE_BY_RECV:
        return by_recv(&arena);
    case GM_PROBE_BY_COPY:
        return by_copy(&arena);
    default:
        return gm_trial_call(madvise(arena.alias, arena.page, MADV_POPULATE_WRITE),
                             "MADV_POPULATE_WRITE");
    }
}

struct gm_trial gm_probe_pin(int backing)
{
    gm_auto_arena arena = GM_NO_ARENA;
    struct gm_trial opened = gm_arena_open(&arena, backing);
    int ends[2];
    int error;

    if (opened.ok != 1)
        return opened;
    error = gm_arena_fill(&arena);
    if (error)
        return gm_trial_no_page(&arena, error);
    if (pipe2(ends, O_CLOEXEC) < 0)
        return gm_trial_untried("pipe2", errno);
    gm_auto_fd in = ends[0];
    gm_auto_fd out = ends[1];
    struct iovec page = {arena.alias, (size_t)sysconf(_SC_PAGESIZE)};

    (void)in;
    if (vmsplice(out, &page, 1, SPLICE_F_NONBLOCK) >= 0)
        return gm_trial_yes(0);
    return errno == EFAULT ? gm_trial_no("vmsplice", errno) : gm_trial_untried("vmsplice", errno);
}

static long long elapsed_ns(const struct timespec *from, const struct timespec *to)
{
    return (to->tv_sec - from->tv_sec) * 1000000000LL + (to->tv_nsec - from->tv_nsec);
}

struct gm_trial gm_probe_clock(void)
{
    struct timespec start, now;
    long long best = -1;

    for (int round = 0; round < CLOCK_ROUNDS; round++) {
        clock_gettime(CLOCK_MONOTONIC, &start);
        for (int i = 0; i < CLOCK_READINGS; i++)
            if (clock_gettime(CLOCK_MONOTONIC, &now) < 0)
                return gm_trial_no("clock_gettime", errno);
        long long taken = elapsed_ns(&start, &now) / CLOCK_READINGS;

        if (best < 0 || taken < best)
            best = taken;
    }
    return gm_trial_yes(best);
}

struct gm_trial gm_probe_crc32c(void)
{
#if defined(__x86_64__)
    return __builtin_cpu_supports("sse4.2") ? gm_trial_yes(0)
                                            : gm_trial_no("CPUID does not show SSE 4.2", 0);
#elif defined(__aarch64__)
    return getauxval(AT_HWCAP) & (1UL << 7) ? gm_trial_yes(0)
                                            : gm_trial_no("AT_HWCAP does not show CRC32", 0);
#else
    return gm_trial_untried("no code for this CPU", 0);
#endif
}
