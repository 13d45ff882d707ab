#include "push.h"

#include "clock.h"
#include "sender.h"

#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>

/* A full socket of a destination that keeps up has room again before this; then the event loop need not be asked. */
enum { LINGER_MS = 10 };

enum { BEATS = 64 }; /* heard at once */

struct gm_push {
    struct gm_sender sender;
    uint64_t rate; /* that the stream keeps to */
};

struct gm_push *gm_push_new(struct gm_source *s, unsigned lane, int socket, struct gm_tls *tls, int checksum,
                            struct gm_problem *ret)
{
    struct gm_push *p = calloc(1, sizeof *p);

    if (!p) {
        gm_blame(ret, GM_KERNEL, ENOMEM, "lane %u", lane);
        return NULL;
    }
    if (gm_sender_init(&p->sender, s, lane, socket, tls, checksum, ret) < 0) {
        free(p);
        return NULL;
    }
    atomic_fetch_add(&s->pushing, 1);
    return p;
}

void gm_push_free(struct gm_push *p)
{
    if (p) {
        atomic_fetch_sub(&p->sender.source->pushing, 1);
        gm_sender_deinit(&p->sender);
    }
    free(p);
}

/* Sends what is queued, and waits a little for the room to do so. As gm_sender_flush(). */
static int flush(struct gm_push *p, struct gm_problem *ret)
{
    struct pollfd room = {.fd = p->sender.stream.socket, .events = POLLOUT};
    int left = gm_sender_flush(&p->sender, ret);

    while (left > 0 && poll(&room, 1, LINGER_MS) > 0)
        left = gm_sender_flush(&p->sender, ret);
    return left;
}

/* The kernel spaces what is sent: a pause between bursts would make whoever waits wait for a burst. */
static void keep_to_rate(struct gm_push *p)
{
    struct gm_round_trip way = gm_stream_round_trip(&p->sender.stream);
    uint64_t rate = gm_source_lane_rate(p->sender.source);

    gm_source_note_queue(p->sender.source, way.now_us - way.least_us);
    if (rate != p->rate)
        gm_stream_pace(&p->sender.stream, rate);
    p->rate = rate;
}

/* Queues what comes next. Returns 1, 0 if there is nothing, or -1. */
static int add_next(struct gm_push *p, struct gm_problem *ret)
{
    struct gm_source *source = p->sender.source;
    const struct gm_region *region;
    uint64_t first;
    unsigned count;

    if (!gm_source_next(source, &region, &first, &count))
        return 0;
    if (gm_sender_add(&p->sender, region, first, count, ret) < 0)
        return -1;
    atomic_fetch_add_explicit(&source->n.background_pages, count, memory_order_relaxed);
    return 1;
}

int gm_push_run(struct gm_push *p, uint32_t budget_us, struct gm_problem *ret)
{
    struct gm_source *source = p->sender.source;
    uint64_t until = gm_now_ns() + (uint64_t)budget_us * 1000;

    do {
        int added, left;

        keep_to_rate(p);
        left = flush(p, ret);
        if (left)
            return left < 0 ? -1 : GM_PUSH_FULL;
        if (gm_source_pause_us(source))
            return GM_PUSH_EARLY;
        do
            added = add_next(p, ret);
        while (added > 0 && gm_sender_takes_more(&p->sender));
        if (added < 0)
            return -1;
        if (!added && gm_sender_empty(&p->sender))
            return GM_PUSH_DONE;
    } while (gm_now_ns() < until);
    return GM_PUSH_BUSY;
}

int gm_push_beat(struct gm_push *p, struct gm_problem *ret)
{
    int left = gm_sender_flush(&p->sender, ret);

    if (left)
        return left < 0 ? -1 : GM_PUSH_FULL;
    gm_sender_beat(&p->sender);
    left = gm_sender_flush(&p->sender, ret);
    return left < 0 ? -1 : left ? GM_PUSH_FULL : GM_PUSH_DONE;
}

int gm_push_hear(struct gm_push *p, struct gm_problem *ret)
{
    struct gm_stream *stream = &p->sender.stream;
    unsigned char beats[BEATS * GM_HEADER_BYTES];
    ssize_t got = gm_stream_read(stream, beats, sizeof beats);

    return got < 0 ? gm_stream_ended(stream, got, "", ret) : got > 0;
}
