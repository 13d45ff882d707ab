#include "stream.h"

#include "clock.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/socket.h>

void gm_stream_init(struct gm_stream *s, unsigned lane, int socket, const char *peer)
{
    *s = (struct gm_stream){.socket = socket, .peer = peer, .heard_ns = gm_now_ns()};
    if (lane)
        snprintf(s->name, sizeof s->name, "background lane %u", lane);
    else
        snprintf(s->name, sizeof s->name, "urgent lane");
}

ssize_t gm_stream_read(struct gm_stream *s, void *to, size_t most)
{
    ssize_t got;

    do
        got = recv(s->socket, to, most, MSG_DONTWAIT);
    while (got < 0 && errno == EINTR);
    if (got > 0)
        atomic_store_explicit(&s->heard_ns, gm_now_ns(), memory_order_relaxed);
    if (got < 0)
        return errno == EAGAIN ? 0 : -errno;
    return got ? got : -EPIPE;
}

ssize_t gm_stream_write(struct gm_stream *s, const struct iovec *pieces, size_t count)
{
    struct msghdr message = {.msg_iov = (struct iovec *)(uintptr_t)pieces, .msg_iovlen = count};
    ssize_t put;

    do
        put = sendmsg(s->socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (put < 0 && errno == EINTR);
    if (put < 0)
        return errno == EAGAIN ? 0 : -errno;
    return put;
}

int gm_stream_ended(const struct gm_stream *s, ssize_t error, const char *where, struct gm_problem *ret)
{
    if (error == -EPIPE)
        return gm_blame(ret, GM_LINK, 0, "%s: closed by the %s%s", s->name, s->peer, where);
    return gm_blame(ret, GM_LINK, (int)-error, "%s", s->name);
}
