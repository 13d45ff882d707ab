/*
 * One migration at its source: which pages are still to be sent.
 *
 * At the source, the claimed bitmap of a region says which pages some lane has taken to send. A page that a fault asks for is sent
 * whether it was taken or not: the copy that is on its way may be behind much else.
 */
#ifndef GM_SOURCE_H
#define GM_SOURCE_H

#include "giveway.h"
#include "memory.h"
#include "order.h"
#include "problem.h"
#include "trace.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

/* python */
struct gm_source;

struct gm_source_counters {
    uint64_t urgent_pages, ahead_pages, background_pages, zero_pages, sent_bytes;
};

struct gm_source *gm_source_new(struct gm_memory *m, struct gm_problem *ret);
void gm_source_free(struct gm_source *s);
void gm_source_counters(const struct gm_source *s, struct gm_source_counters *out);

/* The background sends at most so many bytes a second, 0 as many as it can; faults are never held back. */
void gm_source_set_rate(struct gm_source *s, uint64_t bytes_per_s);
/* Whether the background gives way to faults (giveway.h); it does unless told not to. */
void gm_source_set_giveway(struct gm_source *s, int giveway);
/* What a background lane sends stands in a queue for so long. */
void gm_source_note_queue(struct gm_source *s, uint32_t queue_us);
/* Bytes a second that one background lane may send now to give way, 0 for no limit. */
uint64_t gm_source_lane_rate(struct gm_source *s);
/* How long the background has to hold its breath now, in µs. */
uint64_t gm_source_pause_us(struct gm_source *s);

/* The guest has stopped: what its memory holds is final. Until then, requests are passed over; they come again with the switch. */
void gm_source_open(struct gm_source *s);

/* Begins anew: every page is still to be sent, but for those that gm_source_skip() names next. */
void gm_source_restart(struct gm_source *s);
void gm_source_skip(struct gm_source *s, unsigned region, uint64_t first, uint64_t count);

/* Has the background send these pages first. The order must not change any more, and must outlive the source. */
void gm_source_follow(struct gm_source *s, const struct gm_order *order);

/*
 * From now on the pages that are asked for are written down, for gm_trace_read(). Before any lane is made; NULL when there is no
 * memory for `records` of them, a power of two.
 */
struct gm_trace *gm_source_learn(struct gm_source *s, uint32_t records, struct gm_problem *ret);

/*
 * Finds holes of a region's file and takes them out of what is to be sent: pairs (first page, pages) into `pairs`, `most` at the most,
 * from page *from on, which is moved past what was looked at. Returns how many pairs; fewer means that the end was reached.
 */
unsigned gm_source_holes(struct gm_source *s, unsigned region, uint64_t *from, uint64_t *pairs, unsigned most);
/* end python */

struct gm_source {
    struct gm_memory *memory;
    _Atomic bool open;
    pthread_mutex_t lock; /* of the cursor */
    unsigned region;
    uint64_t page;
    const struct gm_order *order; /* or NULL */
    uint64_t run, into; /* where in the order: a run, and pages of it that are behind us */
    bool from_start; /* the cursor has come from the beginning, so nothing is left before it */
    struct gm_trace *asked; /* or NULL; the urgent lane writes it */
    uint64_t rate, due_ns; /* with a rate: when what has been taken so far will have gone */
    struct gm_giveway giveway;
    bool insists;             /* the background gives way to nobody */
    _Atomic unsigned pushing; /* background lanes */
    struct {
        _Atomic uint64_t urgent_pages, ahead_pages, background_pages, zero_pages, sent_bytes;
    } n;
};

/* Has the background go on from here. */
void gm_source_go_to(struct gm_source *s, uint32_t region, uint64_t page);

/* Takes the next pages that a background frame may carry; false when all are taken. */
bool gm_source_next(struct gm_source *s, const struct gm_region **region, uint64_t *first, unsigned *count);

#endif
