#include "lane.h"

#include "clock.h"
#include "crc32c.h"
#include "install.h"

#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* One damaged frame is a flipped bit somewhere on the way; a second on the same connection is a broken way. */
enum { DAMAGED_FRAMES = 1 };

/* Claimed at a time while there are faults: who wants a page of a claim waits until all of it is in place. With whole frames, a vCPU that
 * walks along with the background waited almost twice as long; without faults, they bring a tenth more throughput. */
enum { PIECE_BYTES = 32 * 1024 };

/* A thread that has emptied the socket waits this long for more, before it is given to another lane. */
enum { LINGER_MS = 2 };

/* Room for the largest frame of this guest, and as much again to read ahead. */
static size_t buffer_size(const struct gm_memory *m)
{
    uint64_t largest = 0;

    for (unsigned i = 0; i < m->count; i++) {
        uint64_t frame = gm_bytes(&m->region[i], gm_frame_pages(&m->region[i]));

        if (frame > largest)
            largest = frame;
    }
    return 2 * (size_t)(GM_HEADER_BYTES + largest);
}

struct gm_lane *gm_lane_new(struct gm_destination *d, unsigned index, int socket, struct gm_tls *tls, int checksum,
                            struct gm_problem *ret)
{
    struct gm_lane *lane = calloc(1, sizeof *lane);

    if (lane) {
        gm_stream_init(&lane->stream, index, socket, tls, "source");
        lane->destination = d;
        lane->index = index;
        lane->checksum = checksum;
        lane->capacity = buffer_size(d->memory);
        lane->buffer = malloc(lane->capacity);
        for (unsigned i = 0; i < d->memory->count; i++)
            /* Who deciphers has the content in memory of its own, and puts it in place as any other. */
            lane->direct |= !tls && d->memory->region[i].populate == GM_POPULATE_RECV;
    }
    if (!lane || !lane->buffer) {
        gm_blame(ret, GM_KERNEL, ENOMEM, "lane %u", index);
        gm_lane_free(lane);
        return NULL;
    }
    return lane;
}

void gm_lane_free(struct gm_lane *lane)
{
    if (lane)
        free(lane->buffer);
    free(lane);
}

uint64_t gm_lane_heard_ns(const struct gm_lane *lane)
{
    return gm_stream_heard_ns(&lane->stream);
}

int gm_lane_held(const struct gm_lane *lane)
{
    return lane->held;
}

/* Bytes that are still to come before the frame at `start` is whole; 0 when it is. */
static int lacking(struct gm_lane *lane, size_t *ret, struct gm_problem *problem)
{
    size_t have = lane->end - lane->start;

    if (!lane->has_frame) {
        if (have < GM_HEADER_BYTES) {
            *ret = GM_HEADER_BYTES - have;
            return 0;
        }
        if (gm_frame_decode_untrusted(lane->buffer + lane->start, lane->destination->memory, 1, lane->checksum,
                                      lane->stream.name, &lane->frame, problem) < 0)
            return -1;
        lane->has_frame = 1;
        lane->looked = lane->buffered = false;
    }
    *ret = GM_HEADER_BYTES + lane->frame.length > have ? GM_HEADER_BYTES + lane->frame.length - have : 0;
    return 0;
}

int gm_lane_ask_again(struct gm_lane *lane, struct gm_problem *ret)
{
    const struct gm_frame *f = &lane->frame;

    GM_COUNT(lane->destination, damaged_frames, 1);
    if (++lane->damaged > DAMAGED_FRAMES || f->kind == GM_KIND_BEAT)
        return gm_blame(ret, GM_LINK, 0, "%s: frame %u of region %u, page %llu is damaged, and not the first",
                        lane->stream.name, f->kind, f->region, (unsigned long long)f->first);
    return gm_destination_ask(lane->destination, f->region, f->first, f->count, ret);
}

void gm_lane_count(const struct gm_lane *lane, uint64_t claimed, uint64_t bytes)
{
    struct gm_destination *d = lane->destination;
    uint64_t pages = (unsigned)__builtin_popcountll(claimed);

    if (lane->frame.kind == GM_KIND_ZERO) {
        GM_COUNT(d, zero_pages, pages);
    } else if (lane->index) {
        GM_COUNT(d, background_pages, pages);
        GM_COUNT(d, background_bytes, bytes);
    } else {
        GM_COUNT(d, urgent_pages, pages);
        GM_COUNT(d, urgent_bytes, bytes);
    }
}

/* Space comes back. Meanwhile a background lane keeps its frame and lets the source wait; the urgent lane is the pager's, which must
 * not wait: what is missing there is asked for again. */
static bool worth_keeping(const struct gm_lane *lane, const struct gm_problem *problem)
{
    return lane->index && (problem->error == ENOSPC || problem->error == ENOMEM);
}

/* Returns false: they are not in place. */
static bool stuck(struct gm_lane *lane, bool keep, const struct gm_problem *problem)
{
    lane->held = keep;
    gm_destination_tell(lane->destination, GM_EVENT_STUCK, problem);
    return false;
}

/* Returns whether they are in place. */
static bool install_piece(struct gm_lane *lane, struct gm_region *r, uint64_t first, unsigned count,
                          const unsigned char *content)
{
    struct gm_destination *d = lane->destination;
    struct gm_stages *stages = lane->index ? NULL : d->memory->stages;
    struct gm_problem problem;
    struct gm_install in;

    if (gm_install_begin(&in, d, lane->index, r, first, count, &problem) < 0)
        return stuck(lane, lane->index, &problem);
    if (gm_install_populate(&in, content, &problem) < 0) {
        gm_install_give_up(&in);
        return stuck(lane, worth_keeping(lane, &problem), &problem);
    }
    gm_stamp(stages, GM_STAGE_POPULATED, r->index, first);
    gm_install_finish(&in);
    gm_lane_count(lane, in.claimed, content ? gm_bytes(r, count) : 0);
    return true;
}

/* Pages to claim at a time. */
static unsigned piece_of(struct gm_lane *lane, const struct gm_region *r)
{
    struct gm_destination *d = lane->destination;
    uint64_t faults = atomic_load_explicit(&d->n.faults, memory_order_relaxed);
    bool wanted = faults != lane->faults || gm_waits_any(&d->waits);
    unsigned pages = (unsigned)PIECE_BYTES >> r->page_shift;

    lane->faults = faults;
    if (!wanted)
        return GM_FRAME_PAGES;
    return pages ? pages : 1;
}

static void install(struct gm_lane *lane, const unsigned char *payload)
{
    const struct gm_frame *f = &lane->frame;
    struct gm_region *r = &lane->destination->memory->region[f->region];
    unsigned piece = piece_of(lane, r);

    if (!lane->index)
        gm_stamp(lane->destination->memory->stages, GM_STAGE_ARRIVED, f->region, f->first);
    for (unsigned at = 0, count; at < f->count; at += count) {
        count = f->count - at < piece ? f->count - at : piece;
        if (!install_piece(lane, r, f->first + at, count, f->kind == GM_KIND_PAGES ? payload + gm_bytes(r, at) : NULL))
            return;
    }
}

static int take_frame(struct gm_lane *lane, struct gm_problem *ret)
{
    const unsigned char *payload = lane->buffer + lane->start + GM_HEADER_BYTES;
    int result = 0;

    if (lane->checksum && gm_crc32c(0, payload, lane->frame.length) != lane->frame.crc)
        result = gm_lane_ask_again(lane, ret);
    else if (lane->frame.kind != GM_KIND_BEAT)
        install(lane, payload);
    if (lane->held)
        return 0;
    lane->start += GM_HEADER_BYTES + lane->frame.length;
    lane->has_frame = 0;
    return result;
}

static void make_room(struct gm_lane *lane, size_t lacking)
{
    if (lane->start == lane->end) {
        lane->start = lane->end = 0;
    } else if (lane->capacity - lane->end < lacking) {
        memmove(lane->buffer, lane->buffer + lane->start, lane->end - lane->start);
        lane->end -= lane->start;
        lane->start = 0;
    }
}

/* Reads what is there; in a lane that reads nothing ahead, at most `lacking` bytes. Returns 1 if something was, 0 if nothing, -1 at the
 * end. */
static int fill(struct gm_lane *lane, size_t lacking, struct gm_problem *ret)
{
    size_t most = lane->direct ? lacking : lane->capacity - lane->end;
    ssize_t got = gm_stream_read(&lane->stream, lane->buffer + lane->end, most);

    if (got < 0)
        return gm_stream_ended(&lane->stream, got, lane->start != lane->end ? " in the middle of a frame" : "", ret);
    lane->end += (size_t)got;
    return got > 0;
}

static bool takes_direct(const struct gm_lane *lane)
{
    return lane->direct && lane->has_frame && !lane->buffered && lane->frame.kind == GM_KIND_PAGES &&
           lane->destination->memory->region[lane->frame.region].populate == GM_POPULATE_RECV;
}

/* One step. Returns 1 when something was done, 0 when more has to come, -1 at the end. */
static int step(struct gm_lane *lane, struct gm_problem *ret)
{
    size_t more;

    if (lacking(lane, &more, ret) < 0)
        return -1;
    if (takes_direct(lane))
        return gm_lane_install_direct(lane, ret);
    if (!more)
        return take_frame(lane, ret) < 0 ? -1 : 1;
    make_room(lane, more);
    return fill(lane, more, ret);
}

int gm_lane_receive(struct gm_lane *lane, uint32_t budget_us, struct gm_problem *ret)
{
    uint64_t now = gm_now_ns(), until = now + (uint64_t)budget_us * 1000;

    lane->held = false;
    while (now < until) {
        int done = step(lane, ret);

        if (done < 0)
            return -1;
        if (lane->held)
            return GM_LANE_BUSY;
        now = gm_now_ns();
        if (!done) {
            struct pollfd more = {.fd = lane->stream.socket, .events = POLLIN};

            if (!lane->index || poll(&more, 1, LINGER_MS) <= 0)
                return GM_LANE_IDLE;
        }
    }
    return GM_LANE_BUSY;
}

void gm_lane_beat(struct gm_lane *lane)
{
    unsigned char header[GM_HEADER_BYTES];
    struct gm_frame frame = {.kind = GM_KIND_BEAT};
    struct iovec all = {header, sizeof header};

    gm_frame_encode(&frame, header);
    gm_stream_write(&lane->stream, &all, 1);
}
