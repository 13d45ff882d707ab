#include "sender.h"

#include "crc32c.h"
#include "memfile.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

enum {
    GATHER_BYTES = GM_FRAME_PAGES / 2 * 4096, /* frames of less go together: half of what one of base pages may carry */
    /* What the kernel makes one packet of. A kernel that does not preempt keeps the CPU until a send() is over, and on loopback that
     * takes the receiver's share in; a larger one made faults wait longer, and cost a third more CPU with two lanes on two CPUs. */
    AT_ONCE_BYTES = 64 * 1024,
};

static size_t largest_frame(const struct gm_memory *m)
{
    size_t largest = 0;

    for (unsigned i = 0; i < m->count; i++) {
        size_t frame = gm_bytes(&m->region[i], gm_frame_pages(&m->region[i]));

        if (frame > largest)
            largest = frame;
    }
    return largest;
}

int gm_sender_init(struct gm_sender *s, struct gm_source *source, unsigned lane, int socket, struct gm_tls *tls,
                   int checksum, struct gm_problem *ret)
{
    *s = (struct gm_sender){.source = source, .checksum = checksum};
    gm_stream_init(&s->stream, lane, socket, tls, "destination");
    s->capacity = largest_frame(source->memory) + GATHER_BYTES;
    s->data = malloc(s->capacity);
    if (!s->data)
        return gm_blame(ret, GM_KERNEL, ENOMEM, "lane %u", lane);
    return 0;
}

void gm_sender_deinit(struct gm_sender *s)
{
    free(s->data);
}

bool gm_sender_fits(const struct gm_sender *s, const struct gm_region *r, unsigned count)
{
    /* Every page may become a frame of its own, of two vectors; and a beat may follow. */
    return s->frames + count < 2 * GM_FRAME_PAGES && s->used + gm_bytes(r, count) <= s->capacity;
}

bool gm_sender_takes_more(const struct gm_sender *s)
{
    return s->frames < GM_FRAME_PAGES && s->used < GATHER_BYTES;
}

static void add_frame(struct gm_sender *s, struct gm_frame *frame, unsigned char *payload)
{
    unsigned char *header = s->headers[s->frames++];

    if (s->checksum) {
        frame->flags = GM_FRAME_CRC;
        frame->crc = gm_crc32c(0, payload, frame->length);
    }
    gm_frame_encode(frame, header);
    s->vector[s->vectors++] = (struct iovec){header, GM_HEADER_BYTES};
    if (frame->length)
        s->vector[s->vectors++] = (struct iovec){payload, frame->length};
}

int gm_sender_add(struct gm_sender *s, const struct gm_region *r, uint64_t first, unsigned count,
                  struct gm_problem *ret)
{
    unsigned char *data = s->data + s->used;
    size_t page = gm_bytes(r, 1);
    int error = gm_region_read(r, gm_bytes(r, first), gm_bytes(r, count), data);

    if (error)
        return gm_blame(ret, GM_VMM, -error, "region %u: pages %llu to %llu cannot be read", r->index,
                        (unsigned long long)first, (unsigned long long)(first + count - 1));
    s->used += count * page;
    for (unsigned at = 0, run; at < count; at += run) {
        bool zero = gm_is_zero(data + at * page, page);
        struct gm_frame frame = {
            .kind = zero ? GM_KIND_ZERO : GM_KIND_PAGES,
            .region = (uint16_t)r->index,
            .first = first + at,
        };

        for (run = 1; at + run < count && gm_is_zero(data + (at + run) * page, page) == zero; run++)
            ;
        frame.count = run;
        frame.length = zero ? 0 : (uint32_t)(run * page);
        if (zero)
            atomic_fetch_add_explicit(&s->source->n.zero_pages, run, memory_order_relaxed);
        add_frame(s, &frame, data + at * page);
    }
    return 0;
}

void gm_sender_beat(struct gm_sender *s)
{
    struct gm_frame frame = {.kind = GM_KIND_BEAT};

    add_frame(s, &frame, NULL);
}

/* As gm_stream_write(), of what comes next. */
static ssize_t send_some(struct gm_sender *s)
{
    size_t end = s->sent, bytes = 0, over;
    ssize_t put;

    while (end < s->vectors && bytes < AT_ONCE_BYTES)
        bytes += s->vector[end++].iov_len;
    over = bytes > AT_ONCE_BYTES ? bytes - AT_ONCE_BYTES : 0;
    s->vector[end - 1].iov_len -= over;
    put = gm_stream_write(&s->stream, s->vector + s->sent, end - s->sent);
    s->vector[end - 1].iov_len += over;
    return put;
}

int gm_sender_flush(struct gm_sender *s, struct gm_problem *ret)
{
    while (!gm_sender_empty(s)) {
        ssize_t put = send_some(s);

        if (put < 0)
            return gm_stream_ended(&s->stream, put, "", ret);
        if (!put)
            return 1;
        atomic_fetch_add_explicit(&s->source->n.sent_bytes, (uint64_t)put, memory_order_relaxed);
        while (put > 0) {
            struct iovec *v = &s->vector[s->sent];
            size_t here = (size_t)put < v->iov_len ? (size_t)put : v->iov_len;

            v->iov_base = (char *)v->iov_base + here;
            v->iov_len -= here;
            put -= (ssize_t)here;
            s->sent += !v->iov_len;
        }
    }
    s->frames = s->vectors = s->sent = 0;
    s->used = 0;
    return 0;
}
