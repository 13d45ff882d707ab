#include "measure.h"

#include "cleanup.h"
#include "guard.h"
#include "memfile.h"
#include "memory.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>

/* What goes through the socket at a time: fits the smallest send buffer that hosts have. */
enum { PIECE = 64 * 1024 };

struct target {
    int fd, socket;
    enum gm_populate populate;
    unsigned char *alias, *buffer;
};

/* The thread's own time: who else runs here now says nothing of the way. */
static uint64_t spent_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int populate(const struct target *t, uint64_t at)
{
    unsigned char *to = t->populate == GM_POPULATE_RECV ? t->alias + at : t->buffer;

    if (recv(t->socket, to, PIECE, MSG_WAITALL) != PIECE)
        return errno ? -errno : -EIO;
    if (t->populate == GM_POPULATE_WRITE)
        return gm_memfile_write(t->fd, t->buffer, PIECE, at);
    if (t->populate == GM_POPULATE_COPY)
        return gm_guarded_store(t->alias + at, t->buffer, PIECE);
    return 0;
}

static int64_t measure(const struct target *t, int from, uint64_t length, struct gm_problem *ret)
{
    uint64_t spent = 0;

    for (uint64_t at = 0; at < length; at += PIECE) {
        uint64_t began;
        int error;

        memset(t->buffer, (int)(at / PIECE) | 1, PIECE);
        if (send(from, t->buffer, PIECE, 0) != PIECE)
            return gm_blame(ret, GM_KERNEL, errno, "populate cannot be measured");
        began = spent_ns();
        error = populate(t, at);
        spent += spent_ns() - began;
        if (error)
            return gm_blame(ret, GM_KERNEL, -error, "this way to populate does not work here");
    }
    return (int64_t)spent;
}

int64_t gm_measure_populate(int fd, int way, uint64_t length, struct gm_problem *ret)
{
    struct target t = {.fd = fd, .populate = (enum gm_populate)way};
    gm_auto_free unsigned char *buffer = malloc(PIECE);
    gm_auto_fd from = -1, to = -1;
    int pair[2];
    int64_t spent;

    if (!buffer || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
        return gm_blame(ret, GM_KERNEL, errno, "populate cannot be measured");
    from = pair[0];
    to = pair[1];
    t.socket = to;
    t.buffer = buffer;
    t.alias = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (t.alias == MAP_FAILED)
        return gm_blame(ret, GM_KERNEL, errno, "the memory file cannot be mapped");
    spent = measure(&t, from, length, ret);
    munmap(t.alias, length);
    return spent;
}
