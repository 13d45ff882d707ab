/*
 * When the stages of a fault came, for who wants to see where its time goes. Off unless asked for; docs/performance.md says how to read it.
 *
 * Any thread stamps, and none waits: a stamp takes the next place in a ring, and the oldest goes.
 */
#ifndef GM_STAGES_H
#define GM_STAGES_H

#include <stdatomic.h>
#include <stdint.h>

/* python */
/* In the order of a fault. The guest's own are stamped by who touches; GM_STAGE_ASKED and _ANSWERED are of all that came before them, and
 * stamped before the send: the other end may have read what is sent before the call returns. */
enum gm_stage {
    GM_STAGE_TOUCHED = 1,
    GM_STAGE_READ,      /* destination: the message was read */
    GM_STAGE_ASKED,     /* destination: requests are about to be sent */
    GM_STAGE_TAKEN,     /* source: the request was read */
    GM_STAGE_ANSWERED,  /* source: answers are about to be sent */
    GM_STAGE_ARRIVED,   /* destination: the answer is there, whole */
    GM_STAGE_POPULATED, /* destination: its content is in place */
    GM_STAGE_CONTINUED, /* destination: who waits has been woken */
    GM_STAGE_RUNNING,
};

struct gm_stamp {
    uint64_t time_ns; /* CLOCK_MONOTONIC */
    uint64_t what;    /* stage, 8 bits; region, 16 bits; page, 40 bits */
};
/* end python */

enum { GM_STAMPS = 64 * 1024 }; /* the latest 10 000 faults and more, in 1 MiB */

struct gm_stages {
    _Atomic uint64_t next;
    struct {
        _Atomic uint64_t time_ns, what;
    } stamp[GM_STAMPS];
};

void gm_stages_stamp(struct gm_stages *s, enum gm_stage stage, unsigned region, uint64_t page);

/* Copies out what is whole, oldest first, `most` at the most; returns how many. */
unsigned gm_stages_read(struct gm_stages *s, struct gm_stamp *out, unsigned most);

/* `stages` may be NULL: then nobody wants to know. */
static inline void gm_stamp(struct gm_stages *stages, enum gm_stage stage, unsigned region, uint64_t page)
{
    if (stages)
        gm_stages_stamp(stages, stage, region, page);
}

#endif
