#include "stream.h"

#include "clock.h"

#include <errno.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/socket.h>

/* The longest that a tick of the kernel is: its times are as exact, and silence must not look like a sign of life. */
enum { TICK_MS = 10 };

void gm_stream_init(struct gm_stream *s, unsigned lane, int socket, struct gm_tls *tls, const char *peer)
{
    *s = (struct gm_stream){.socket = socket, .tls = tls, .peer = peer, .heard_ns = gm_now_ns()};
    if (lane)
        snprintf(s->name, sizeof s->name, "background lane %u", lane);
    else
        snprintf(s->name, sizeof s->name, "urgent lane");
}

static ssize_t read_plain(const struct gm_stream *s, void *to, size_t most)
{
    ssize_t got;

    do
        got = recv(s->socket, to, most, MSG_DONTWAIT);
    while (got < 0 && errno == EINTR);
    if (got < 0)
        return errno == EAGAIN ? 0 : -errno;
    return got ? got : -EPIPE;
}

/* What a session wants is for the socket to tell. Its problem stays with it until gm_stream_ended(). */
static ssize_t result_of(int64_t done)
{
    return done == GM_TLS_PROBLEM ? -EPROTO : done < 0 ? 0 : (ssize_t)done;
}

static ssize_t read_tls(const struct gm_stream *s, void *to, size_t most)
{
    struct gm_problem problem;
    int64_t got = gm_tls_read(s->tls, to, most, &problem);

    return got ? result_of(got) : -EPIPE;
}

ssize_t gm_stream_read(struct gm_stream *s, void *to, size_t most)
{
    ssize_t got = s->tls ? read_tls(s, to, most) : read_plain(s, to, most);

    if (got > 0)
        atomic_store_explicit(&s->heard_ns, gm_now_ns(), memory_order_relaxed);
    return got;
}

ssize_t gm_stream_write(struct gm_stream *s, const struct iovec *pieces, size_t count)
{
    struct msghdr message = {.msg_iov = (struct iovec *)(uintptr_t)pieces, .msg_iovlen = count};
    struct gm_problem problem;
    ssize_t put;

    if (s->tls)
        return result_of(gm_tls_write_vector(s->tls, pieces, count, &problem));
    do
        put = sendmsg(s->socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (put < 0 && errno == EINTR);
    if (put < 0)
        return errno == EAGAIN ? 0 : -errno;
    return put;
}

void gm_stream_pace(const struct gm_stream *s, uint64_t bytes_per_s)
{
    uint64_t most = bytes_per_s ? bytes_per_s : UINT64_MAX;

    /* Where this is not known, the background is as fast as it was. */
    if (setsockopt(s->socket, SOL_SOCKET, SO_MAX_PACING_RATE, &most, sizeof most) < 0)
        return;
}

static bool ask_tcp(const struct gm_stream *s, struct tcp_info *info)
{
    socklen_t size = sizeof *info;

    *info = (struct tcp_info){0};
    return getsockopt(s->socket, IPPROTO_TCP, TCP_INFO, info, &size) == 0;
}

struct gm_round_trip gm_stream_round_trip(const struct gm_stream *s)
{
    struct tcp_info info;

    if (!ask_tcp(s, &info))
        return (struct gm_round_trip){0};
    return (struct gm_round_trip){.now_us = info.tcpi_rtt, .least_us = info.tcpi_min_rtt};
}

uint64_t gm_stream_heard_ns(const struct gm_stream *s)
{
    uint64_t heard = atomic_load_explicit(&s->heard_ns, memory_order_relaxed), came;
    struct tcp_info info;

    if (!ask_tcp(s, &info))
        return heard;
    came = gm_now_ns() - ((uint64_t)info.tcpi_last_data_recv + TICK_MS) * 1000000;
    return came > heard ? came : heard;
}

int gm_stream_ended(const struct gm_stream *s, ssize_t error, const char *where, struct gm_problem *ret)
{
    if (error == -EPIPE)
        return gm_blame(ret, GM_LINK, 0, "%s: closed by the %s%s", s->name, s->peer, where);
    if (s->tls && error == -EPROTO) {
        struct gm_problem problem;

        gm_tls_problem(s->tls, &problem);
        return gm_blame_in(ret, &problem, "%s", s->name);
    }
    return gm_blame(ret, GM_LINK, (int)-error, "%s", s->name);
}
