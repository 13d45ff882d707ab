#include "server.h"

#include "ahead.h"
#include "clock.h"
#include "frame.h"
#include "poller.h"
#include "precedence.h"
#include "sender.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum {
    REQUESTS = 128,              /* read at once: as many as a large guest's vCPUs send together */
    PUSHED_LATELY_NS = 10000000, /* a background that runs sends a frame more often than that */
    SURELY = 4, /* a window of so many pages is of a guest that walks; one that jumps may have one of 1 or 2 by chance, and a
                 * background that followed it would leave piece after piece incomplete */
};

struct gm_server {
    struct gm_sender sender;
    struct gm_poll poll;
    struct gm_ahead ahead;
    int epoll, kick;
    _Atomic bool stop, beat;
    bool writable_wanted;
    uint32_t round_trip_us;
    uint64_t pushed, pushed_ns; /* background pages, and when there were more than before */
    size_t start, end; /* of the requests in `in` that are not answered */
    unsigned char in[REQUESTS * GM_HEADER_BYTES];
};

struct gm_server *gm_server_new(struct gm_source *s, int socket, struct gm_tls *tls, int checksum, uint32_t poll_us,
                                uint32_t ahead, struct gm_problem *ret)
{
    struct gm_server *server = calloc(1, sizeof *server);
    struct epoll_event in = {.events = EPOLLIN, .data.fd = socket}, kicked = {.events = EPOLLIN, .data.fd = -1};

    if (!server) {
        gm_blame(ret, GM_KERNEL, ENOMEM, "urgent lane");
        return NULL;
    }
    gm_poll_init(&server->poll, poll_us);
    server->ahead.most = ahead < GM_FRAME_PAGES ? ahead : GM_FRAME_PAGES - 1;
    server->epoll = epoll_create1(EPOLL_CLOEXEC);
    server->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (server->epoll < 0 || server->kick < 0 ||
        epoll_ctl(server->epoll, EPOLL_CTL_ADD, server->kick, &kicked) < 0 ||
        epoll_ctl(server->epoll, EPOLL_CTL_ADD, socket, &in) < 0) {
        gm_blame(ret, GM_KERNEL, errno, "urgent lane");
        gm_server_free(server);
        return NULL;
    }
    if (gm_sender_init(&server->sender, s, 0, socket, tls, checksum, ret) < 0) {
        gm_server_free(server);
        return NULL;
    }
    return server;
}

void gm_server_free(struct gm_server *server)
{
    if (!server)
        return;
    if (server->epoll >= 0)
        close(server->epoll);
    if (server->kick >= 0)
        close(server->kick);
    gm_sender_deinit(&server->sender);
    free(server);
}

static void kick(struct gm_server *server)
{
    uint64_t one = 1;

    if (write(server->kick, &one, sizeof one) < 0)
        return;
}

void gm_server_stop(struct gm_server *server)
{
    atomic_store(&server->stop, true);
    kick(server);
}

void gm_server_beat(struct gm_server *server)
{
    atomic_store(&server->beat, true);
    kick(server);
}

uint64_t gm_server_heard_ns(const struct gm_server *server)
{
    return gm_stream_heard_ns(&server->sender.stream);
}

/* Sends what a guest that walks through memory will want next, and has the background go on behind that, once it surely does. */
static int send_ahead(struct gm_server *server, struct gm_region *r, uint64_t page, struct gm_problem *ret)
{
    struct gm_source *source = server->sender.source;
    uint32_t window = gm_ahead_fault(&server->ahead, r->index, page);
    uint64_t left = r->pages - page - 1;
    unsigned at = 0, run, count = window < left ? window : (unsigned)left;
    uint64_t mask;

    if (!count || !gm_sender_fits(&server->sender, r, count))
        return 0;
    mask = gm_bitmap_claim(r->claimed, page + 1, count);
    for (; (run = gm_mask_run(mask, &at)); at += run)
        if (gm_sender_add(&server->sender, r, page + 1 + at, run, ret) < 0)
            return -1;
    atomic_fetch_add_explicit(&source->n.ahead_pages, (unsigned)__builtin_popcountll(mask), memory_order_relaxed);
    if (window >= SURELY || window == server->ahead.most)
        gm_source_go_to(source, r->index, page + 1 + count);
    return 0;
}

/* Writes down what the guest faulted on. */
static void note(struct gm_trace *asked, const struct gm_frame *f)
{
    struct gm_trace_record record = {.time_ns = gm_now_ns(), .page = f->first, .region = f->region};

    for (; asked && record.page < f->first + f->count; record.page++)
        gm_trace_write(asked, &record);
}

/* Takes the first request that was read. Returns 1 if it has to wait for a flush, 0 if it is dealt with. */
static int take_request(struct gm_server *server, struct gm_problem *ret)
{
    struct gm_source *source = server->sender.source;
    const unsigned char *header = server->in + server->start;
    struct gm_region *r;
    struct gm_frame f;

    if (gm_frame_decode_untrusted(header, source->memory, 0, server->sender.checksum, server->sender.stream.name, &f, ret) < 0)
        return -1;
    if (f.kind == GM_KIND_REQUEST && atomic_load(&source->open)) {
        r = &source->memory->region[f.region];
        if (!gm_sender_fits(&server->sender, r, f.count))
            return 1;
        gm_stamp(source->memory->stages, GM_STAGE_TAKEN, f.region, f.first);
        if (f.crc)
            gm_giveway_wait(&source->giveway, gm_now_ns(), f.crc, server->round_trip_us, source->n.sent_bytes);
        note(source->asked, &f);
        gm_bitmap_set(r->claimed, f.first, f.count);
        if (gm_sender_add(&server->sender, r, f.first, f.count, ret) < 0)
            return -1;
        atomic_fetch_add_explicit(&source->n.urgent_pages, f.count, memory_order_relaxed);
        if (f.count == 1 && gm_frame_pages(r) > 1 && send_ahead(server, r, f.first, ret) < 0)
            return -1;
    }
    server->start += GM_HEADER_BYTES;
    return 0;
}

/* Reads requests. Returns 1 if any came, 0 if none, -1 at the end. */
static int fill(struct gm_server *server, struct gm_problem *ret)
{
    ssize_t got;

    memmove(server->in, server->in + server->start, server->end - server->start);
    server->end -= server->start;
    server->start = 0;
    got = gm_stream_read(&server->sender.stream, server->in + server->end, sizeof server->in - server->end);
    if (got < 0)
        return gm_stream_ended(&server->sender.stream, got, "", ret);
    server->end += (size_t)got;
    return got > 0;
}

/* Answers what was read and sends it. Returns 1 if the socket is full, 0 if all has gone. */
static int answer(struct gm_server *server, struct gm_problem *ret)
{
    int waits = 0;

    do {
        int left;

        while (server->end - server->start >= GM_HEADER_BYTES && (waits = take_request(server, ret)) == 0)
            ;
        if (waits < 0)
            return -1;
        if (gm_sender_empty(&server->sender) && atomic_exchange(&server->beat, false))
            gm_sender_beat(&server->sender);
        if (!gm_sender_empty(&server->sender))
            gm_stamp(server->sender.source->memory->stages, GM_STAGE_ANSWERED, 0, 0);
        left = gm_sender_flush(&server->sender, ret);
        if (left)
            return left;
    } while (waits);
    return 0;
}

static int want_writable(struct gm_server *server, bool wanted, struct gm_problem *ret)
{
    int socket = server->sender.stream.socket;
    struct epoll_event event = {.events = wanted ? EPOLLOUT : EPOLLIN, .data.fd = socket};

    if (wanted == server->writable_wanted)
        return 0;
    server->writable_wanted = wanted;
    if (epoll_ctl(server->epoll, EPOLL_CTL_MOD, socket, &event) < 0)
        return gm_blame(ret, GM_KERNEL, errno, "urgent lane");
    return 0;
}

/* Whether the background sends: then nothing on this host is more urgent than an answer. */
static bool background_runs(struct gm_server *server)
{
    uint64_t pushed = atomic_load_explicit(&server->sender.source->n.background_pages, memory_order_relaxed);
    uint64_t now = gm_now_ns();

    if (pushed != server->pushed)
        server->pushed_ns = now;
    server->pushed = pushed;
    return now - server->pushed_ns < PUSHED_LATELY_NS;
}

/* Sleeps until there is something to do, and takes the kick if it was one. */
static int sleep_until_needed(struct gm_server *server, struct gm_problem *ret)
{
    struct epoll_event events[2];
    uint64_t signals;
    int n;

    server->poll.keeps_cpu = background_runs(server);
    n = gm_poll_wait(&server->poll, server->epoll, events, 2, -1);

    if (n < 0 && errno != EINTR)
        return gm_blame(ret, GM_KERNEL, errno, "urgent lane");
    for (int i = 0; i < n; i++)
        if (events[i].data.fd != server->sender.stream.socket && read(server->kick, &signals, sizeof signals) < 0)
            return gm_blame(ret, GM_KERNEL, errno, "urgent lane");
    return 0;
}

int gm_server_run(struct gm_server *server, struct gm_problem *ret)
{
    GM_GOES_FIRST;

    server->round_trip_us = gm_stream_round_trip(&server->sender.stream).least_us;
    while (!atomic_load(&server->stop)) {
        int full = answer(server, ret);
        int came = full ? 0 : fill(server, ret);

        if (full < 0 || came < 0 || want_writable(server, full, ret) < 0)
            return -1;
        if (!came && sleep_until_needed(server, ret) < 0)
            return -1;
    }
    return 0;
}
