#ifndef GMEMD_VMM_BASE_H
#define GMEMD_VMM_BASE_H

#include <stdint.h>
#include <stdlib.h>
#include <sysexits.h>
#include <time.h>
#include <unistd.h>

/* Reports {"event":"error"} and ends the process with an exit code of sysexits.h. */
__attribute__((noreturn, format(printf, 2, 3))) void fail(int exit_code, const char *format, ...);

static inline uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline void close_cleanup(int *fd)
{
    if (*fd >= 0)
        close(*fd);
}

static inline void free_cleanup(void *pointer)
{
    free(*(void **)pointer);
}

#define CLEANUP_CLOSE __attribute__((cleanup(close_cleanup)))
#define CLEANUP_FREE __attribute__((cleanup(free_cleanup)))

void *allocate(size_t count, size_t size);

#endif
