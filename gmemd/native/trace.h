/* Faults as they were read, kept until the event loop writes them to a file. docs/trace.md gives the format of that. */
#ifndef GM_TRACE_H
#define GM_TRACE_H

#include <stdint.h>

/* python */
struct gm_trace;

#define GM_TRACE_WRITE 1
#define GM_TRACE_MINOR 2

struct gm_trace_record {
    uint64_t time_ns; /* CLOCK_MONOTONIC, when the message was read */
    uint64_t page;
    uint32_t thread; /* as the VMM sees it, 0 if its userfaultfd does not tell */
    uint16_t region;
    uint16_t flags;
};

/* Moves at most `most` records out, oldest first; returns how many. One reader. */
uint32_t gm_trace_read(struct gm_trace *t, struct gm_trace_record *out, uint32_t most);
/* Records that found no room since the last call. */
uint64_t gm_trace_lost(struct gm_trace *t);
/* end python */

/* Room for `records`, a power of two; NULL if there is no memory. */
struct gm_trace *gm_trace_new(uint32_t records);
void gm_trace_free(struct gm_trace *t);
/* One writer; never waits. */
void gm_trace_write(struct gm_trace *t, const struct gm_trace_record *record);

#endif
