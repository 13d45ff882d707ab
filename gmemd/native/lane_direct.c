/*
 * The `recv` way: the socket straight into the alias.
 *
 * Pages are claimed only once the whole payload waits in the socket. A claim is then never held while the network is waited for, and
 * an urgent copy of a page never loses to a background copy that stalls half-way. SO_RCVLOWAT makes readiness mean that the
 * whole payload is there, or that the socket can hold no more of it; in that case it takes the way through the buffer, and so it does
 * where the alias cannot be written: for want of room, for one.
 */
#include "crc32c.h"
#include "guard.h"
#include "install.h"
#include "lane.h"

#include <errno.h>
#include <linux/sockios.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

enum { PIECE = 16 * 1024 }; /* what is checked at a time: stays in the cache */

/* Returns whether the whole payload waits in the socket. */
static int payload_waits(struct gm_lane *lane, struct gm_problem *ret)
{
    int wanted = (int)lane->frame.length, waiting = 0;
    bool all;

    if (ioctl(lane->stream.socket, SIOCINQ, &waiting) < 0)
        return gm_blame(ret, GM_LINK, errno, "%s", lane->stream.name);
    all = waiting >= wanted;
    lane->buffered = !all && lane->looked;
    lane->looked = true;
    if (all || lane->buffered)
        wanted = 1;
    if (setsockopt(lane->stream.socket, SOL_SOCKET, SO_RCVLOWAT, &wanted, sizeof wanted) < 0)
        return gm_blame(ret, GM_LINK, errno, "%s", lane->stream.name);
    return all;
}

/* Moves `length` bytes of the socket to `to`. Returns 0, or -errno with *done bytes moved. */
static int take(struct gm_lane *lane, unsigned char *to, size_t length, size_t *done)
{
    *done = 0;
    while (*done < length) {
        ssize_t got = gm_stream_read(&lane->stream, to + *done, length - *done);

        if (got <= 0)
            return got ? (int)got : -EAGAIN;
        *done += (size_t)got;
    }
    return 0;
}

/* The run of pages at bit `at` that are all claimed, or all not. */
static unsigned same_run(uint64_t claimed, unsigned at, unsigned count)
{
    unsigned run = 1;

    while (at + run < count && (claimed >> (at + run) & 1) == (claimed >> at & 1))
        run++;
    return run;
}

struct payload {
    uint32_t crc;
    size_t in_place; /* what came before this is in the alias, as far as it is ours; the rest is in the lane's buffer */
    bool fault;      /* the alias could not be written, or not be read again */
};

static unsigned char *alias_of(const struct gm_install *in, unsigned at)
{
    return in->region->alias + gm_bytes(in->region, in->first + at);
}

/* Behind the header, each page in its own place. */
static unsigned char *buffer_of(const struct gm_lane *lane, const struct gm_install *in, unsigned at)
{
    return lane->buffer + lane->end + gm_bytes(in->region, at);
}

static void add_to_crc(struct payload *p, const unsigned char *from, size_t length)
{
    unsigned char piece[PIECE];

    for (size_t at = 0; at < length && !p->fault; at += PIECE) {
        size_t here = length - at < PIECE ? length - at : PIECE;

        p->fault = gm_guarded_load(piece, from + at, here) < 0;
        p->crc = gm_crc32c(p->crc, piece, here);
    }
}

/* What is not ours to write, and what cannot be written, goes into the buffer. */
static int take_run(struct gm_lane *lane, const struct gm_install *in, unsigned at, unsigned run, struct payload *p)
{
    size_t length = gm_bytes(in->region, run), done = 0, rest;
    bool ours = in->claimed >> at & 1 && !p->fault;
    int error = ours ? take(lane, alias_of(in, at), length, &done) : -EFAULT;

    if (ours)
        p->in_place = gm_bytes(in->region, at) + done;
    if (error == -EFAULT) {
        p->fault |= ours;
        ours = false;
        error = take(lane, buffer_of(lane, in, at) + done, length - done, &rest);
    }
    if (!error && lane->checksum)
        add_to_crc(p, ours ? alias_of(in, at) : buffer_of(lane, in, at), length);
    return error;
}

static int take_payload(struct gm_lane *lane, const struct gm_install *in, struct payload *p)
{
    int error = 0;

    for (unsigned at = 0, run; at < in->count && !error; at += run) {
        run = same_run(in->claimed, at, in->count);
        error = take_run(lane, in, at, run, p);
    }
    return error;
}

/* Has the buffer hold the whole payload. Returns whether it does: the VMM may have truncated its file. */
static bool take_back(const struct gm_lane *lane, const struct gm_install *in, const struct payload *p)
{
    unsigned run;

    for (unsigned at = 0; (run = gm_mask_run(in->claimed, &at)); at += run) {
        size_t before = gm_bytes(in->region, at), length = gm_bytes(in->region, run);

        if (before >= p->in_place)
            break;
        if (length > p->in_place - before)
            length = p->in_place - before;
        if (gm_guarded_load(buffer_of(lane, in, at), alias_of(in, at), length) < 0)
            return false;
    }
    return true;
}

static int ask(const struct gm_lane *lane, struct gm_problem *ret)
{
    const struct gm_frame *f = &lane->frame;

    return gm_destination_ask(lane->destination, f->region, f->first, f->count, ret);
}

static int forget_frame(struct gm_lane *lane, int result)
{
    lane->start += GM_HEADER_BYTES;
    lane->has_frame = 0;
    return result < 0 ? -1 : 1;
}

/* The socket gives nothing twice. So the frame goes on through the buffer, which finds out what the matter is, and can wait for
 * room. What the guest has taken out meanwhile reads as zeros, and the buffer would take it for damage. */
static int without_alias(struct gm_lane *lane, struct gm_install *in, const struct payload *p, struct gm_problem *ret)
{
    bool whole = take_back(lane, in, p);

    if (gm_install_give_up(in) || !whole)
        return forget_frame(lane, ask(lane, ret));
    lane->end += lane->frame.length;
    lane->buffered = true;
    return 1;
}

int gm_lane_install_direct(struct gm_lane *lane, struct gm_problem *ret)
{
    const struct gm_frame *f = &lane->frame;
    struct gm_destination *d = lane->destination;
    struct gm_stages *stages = lane->index ? NULL : d->memory->stages;
    struct gm_install in;
    struct payload payload = {0};
    int error, ready = payload_waits(lane, ret);

    if (ready <= 0)
        return ready < 0 ? -1 : lane->buffered;
    gm_stamp(stages, GM_STAGE_ARRIVED, f->region, f->first);
    /* The buffer may wait until the frame before is finished. */
    lane->buffered = gm_install_begin(&in, d, lane->index, &d->memory->region[f->region], f->first, f->count, ret) < 0;
    if (lane->buffered)
        return 1;
    error = take_payload(lane, &in, &payload);
    if (error) {
        gm_install_give_up(&in);
        return gm_stream_ended(&lane->stream, error, " in the middle of a frame", ret);
    }
    if (payload.fault)
        return without_alias(lane, &in, &payload, ret);
    if (lane->checksum && payload.crc != f->crc)
        /* A page that the guest took out meanwhile reads as zeros: no fault of the link's, and of the others nothing is known. */
        return forget_frame(lane, gm_install_give_up(&in) ? ask(lane, ret) : gm_lane_ask_again(lane, ret));
    gm_stamp(stages, GM_STAGE_POPULATED, f->region, f->first);
    gm_install_finish(&in);
    gm_lane_count(lane, in.claimed, lane->frame.length);
    return forget_frame(lane, 0);
}
