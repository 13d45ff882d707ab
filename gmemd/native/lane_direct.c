/*
 * The `recv` way: the socket straight into the alias.
 *
 * Pages are claimed only once the whole payload waits in the socket. A claim is then never held while the network is waited for, and
 * an urgent copy of a page never loses to a background copy that stalls half-way. SO_RCVLOWAT makes readiness mean that the
 * whole payload is there, or that the socket can hold no more of it; in that case it takes the way through the buffer.
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
    int fault; /* the alias could not be written */
};

static void add_to_crc(struct payload *p, const unsigned char *from, size_t length)
{
    unsigned char piece[PIECE];

    for (size_t at = 0; at < length && !p->fault; at += PIECE) {
        size_t here = length - at < PIECE ? length - at : PIECE;

        p->fault = gm_guarded_load(piece, from + at, here) < 0;
        p->crc = gm_crc32c(p->crc, piece, here);
    }
}

/* What is not ours to write, and what cannot be written, goes into the lane's buffer behind the header, and is forgotten. */
static int take_run(struct gm_lane *lane, const struct gm_install *in, unsigned at, unsigned run, struct payload *p)
{
    unsigned char *scratch = lane->buffer + lane->end;
    unsigned char *alias = in->region->alias + gm_bytes(in->region, in->first + at);
    size_t length = gm_bytes(in->region, run), done = 0;
    bool ours = in->claimed >> at & 1 && !p->fault;
    int error = ours ? take(lane, alias, length, &done) : -EFAULT;

    if (error == -EFAULT) {
        p->fault |= ours;
        ours = false;
        error = take(lane, scratch, length - done, &done);
    }
    if (!error && lane->checksum)
        add_to_crc(p, ours ? alias : scratch, length);
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

int gm_lane_install_direct(struct gm_lane *lane, struct gm_problem *ret)
{
    const struct gm_frame *f = &lane->frame;
    struct gm_destination *d = lane->destination;
    struct gm_stages *stages = lane->index ? NULL : d->memory->stages;
    struct gm_install in;
    struct payload payload = {0};
    int error, result = 1, ready = payload_waits(lane, ret);

    if (ready <= 0)
        return ready < 0 ? -1 : lane->buffered;
    gm_stamp(stages, GM_STAGE_ARRIVED, f->region, f->first);
    gm_install_begin(&in, d, lane->index, &d->memory->region[f->region], f->first, f->count);
    error = take_payload(lane, &in, &payload);
    if (error) {
        gm_install_give_up(&in);
        return gm_stream_ended(&lane->stream, error, " in the middle of a frame", ret);
    }
    if (payload.fault) {
        gm_install_give_up(&in);
        gm_blame(ret, GM_VMM, EFAULT, "region %u: pages %llu to %llu cannot be put in place", f->region,
                 (unsigned long long)f->first, (unsigned long long)(f->first + f->count - 1));
        gm_destination_tell(d, GM_EVENT_STUCK, ret);
        lane->direct = false; /* what the socket has given cannot be tried again; what the buffer holds can */
    } else if (lane->checksum && payload.crc != f->crc) {
        /* A page that the guest took out meanwhile reads as zeros: no fault of the link's, and of the others nothing is known. */
        if (gm_install_give_up(&in))
            result = gm_destination_ask(d, f->region, f->first, f->count, ret) < 0 ? -1 : 1;
        else
            result = gm_lane_ask_again(lane, ret) < 0 ? -1 : 1;
    } else {
        gm_stamp(stages, GM_STAGE_POPULATED, f->region, f->first);
        gm_install_finish(&in);
        gm_lane_count(lane, in.claimed);
    }
    lane->start += GM_HEADER_BYTES;
    lane->has_frame = 0;
    return result;
}
