/*
 * Each thread's faults are a stream of their own, numbered from 0 in the order in which a block
 * first names them: a page is told as the distance from the stream's last one, which is short for a
 * thread that walks through memory.
 */
#include "trace_code.h"

#include <stdbool.h>
#include <stddef.h>

enum {
    STREAMS = 256,    /* more threads than this begin another block */
    OTHER_REGION = 4, /* beside GM_TRACE_WRITE and GM_TRACE_MINOR */
    FLAG_BITS = 3,
    LONGEST = 30, /* bytes: 2 of head, 5 of thread, 3 of region, 10 of time, 10 of page */
    LONGEST_NUMBER = 10,
};

static const uint64_t LAST_TICK = UINT64_MAX / GM_TRACE_TICK_NS;

_Static_assert(GM_TRACE_CODE_RECORDS == GM_TRACE_CODE_BYTES / 3, "head, time, page: a byte each");

struct stream {
    uint64_t page;
    uint32_t thread;
    uint16_t region;
};

struct streams {
    struct stream stream[STREAMS];
    uint32_t count, latest;
};

/* The number of a thread's stream; `count` if there is none yet. */
static uint32_t find(struct streams *s, uint32_t thread)
{
    if (s->latest < s->count && s->stream[s->latest].thread == thread)
        return s->latest;
    for (uint32_t i = 0; i < s->count; i++)
        if (s->stream[i].thread == thread)
            return s->latest = i;
    return s->latest = s->count;
}

static uint8_t *put(uint8_t *out, uint64_t number)
{
    for (; number > 0x7f; number >>= 7)
        *out++ = (uint8_t)(number | 0x80);
    *out++ = (uint8_t)number;
    return out;
}

/* Distances in both directions as numbers from 0: 0, -1, 1, -2, … */
static uint64_t folded(uint64_t distance)
{
    return (distance << 1) ^ (0 - (distance >> 63));
}

static uint64_t unfolded(uint64_t number)
{
    return (number >> 1) ^ (0 - (number & 1));
}

static uint8_t *put_record(uint8_t *out, const struct gm_trace_record *r, struct streams *s,
                           uint32_t index, uint64_t ticks)
{
    struct stream *stream = &s->stream[index];
    bool is_new = index == s->count;
    uint32_t head;

    if (is_new) {
        *stream = (struct stream){.thread = r->thread};
        s->count++;
    }
    head = index << FLAG_BITS | (r->flags & (GM_TRACE_WRITE | GM_TRACE_MINOR));
    out = put(out, r->region == stream->region ? head : head | OTHER_REGION);
    if (is_new)
        out = put(out, r->thread);
    if (r->region != stream->region) {
        out = put(out, r->region);
        stream->region = r->region;
        stream->page = 0;
    }
    out = put(out, ticks);
    out = put(out, folded(r->page - stream->page));
    stream->page = r->page;
    return out;
}

int gm_trace_encode(const struct gm_trace_record *records, uint32_t n, const uint64_t *pages,
                    uint32_t regions, uint64_t *tick, uint8_t *out, uint32_t *length,
                    struct gm_problem *ret)
{
    struct streams s;
    uint8_t *at = out;
    uint32_t i;

    s.count = s.latest = 0;
    for (i = 0; i < n && at + LONGEST <= out + GM_TRACE_CODE_BYTES; i++) {
        const struct gm_trace_record *r = &records[i];
        uint64_t now = r->time_ns / GM_TRACE_TICK_NS;
        uint32_t index = find(&s, r->thread);

        if (index == STREAMS)
            break;
        if (r->region >= regions || r->page >= pages[r->region]) {
            if (i > 0)
                break;
            return gm_blame(ret, GM_NOBODY, 0, "region %u: no page %llu", r->region,
                            (unsigned long long)r->page);
        }
        at = put_record(at, r, &s, index, now > *tick ? now - *tick : 0);
        *tick = now > *tick ? now : *tick;
    }
    *length = (uint32_t)(at - out);
    return (int)i;
}

struct input {
    const uint8_t *at, *end;
};

static bool take(struct input *in, uint64_t *number)
{
    *number = 0;
    for (unsigned i = 0; i < LONGEST_NUMBER && in->at < in->end; i++) {
        uint64_t byte = *in->at++;

        if (i == LONGEST_NUMBER - 1 && byte > 1)
            return false;
        *number |= (byte & 0x7f) << (7 * i);
        if (byte < 0x80)
            return true;
    }
    return false;
}

/* The stream that a head names; NULL if there cannot be such a one. */
static struct stream *take_stream(struct input *in, struct streams *s, uint64_t index)
{
    uint64_t thread;

    if (index > s->count || index == STREAMS)
        return NULL;
    if (index == s->count) {
        if (!take(in, &thread) || thread > UINT32_MAX)
            return NULL;
        s->stream[s->count++] = (struct stream){.thread = (uint32_t)thread};
    }
    return &s->stream[index];
}

static int take_record_untrusted(struct input *in, struct streams *s, const uint64_t *pages,
                                 uint32_t regions, uint64_t *tick, struct gm_trace_record *out,
                                 struct gm_problem *ret)
{
    uint64_t head, region, ticks, page;
    struct stream *stream;

    if (!take(in, &head) || !(stream = take_stream(in, s, head >> FLAG_BITS)))
        return gm_blame(ret, GM_PEER, 0, "not a record");
    region = stream->region;
    if ((head & OTHER_REGION && !take(in, &region)) || !take(in, &ticks) || !take(in, &page))
        return gm_blame(ret, GM_PEER, 0, "not a record");
    if (region >= regions)
        return gm_blame(ret, GM_PEER, 0, "region %llu of %u", (unsigned long long)region,
                        regions);
    page = unfolded(page) + (head & OTHER_REGION ? 0 : stream->page);
    if (page >= pages[region])
        return gm_blame(ret, GM_PEER, 0, "page %llu outside region %llu (%llu pages)",
                        (unsigned long long)page, (unsigned long long)region,
                        (unsigned long long)pages[region]);
    if (*tick > LAST_TICK || ticks > LAST_TICK - *tick)
        return gm_blame(ret, GM_PEER, 0, "a time that cannot be");
    *tick += ticks;
    stream->region = (uint16_t)region;
    stream->page = page;
    *out = (struct gm_trace_record){
        .time_ns = *tick * GM_TRACE_TICK_NS,
        .page = page,
        .thread = stream->thread,
        .region = (uint16_t)region,
        .flags = (uint16_t)(head & (GM_TRACE_WRITE | GM_TRACE_MINOR)),
    };
    return 0;
}

int gm_trace_decode_untrusted(const uint8_t *in, uint32_t length, const uint64_t *pages,
                              uint32_t regions, uint64_t *tick, struct gm_trace_record *out,
                              struct gm_problem *ret)
{
    struct input input = {in, in + length};
    struct streams s;
    int n = 0;

    s.count = s.latest = 0;
    while (input.at < input.end) {
        if (take_record_untrusted(&input, &s, pages, regions, tick, &out[n], ret) < 0)
            break;
        n++;
    }
    return n;
}
