/*
 * The order in which a guest is expected to need its pages: runs of them, each page once, made from the faults of a trace. A wrong one
 * costs nothing but its good: what it names is sent first, and everything else after that.
 */
#ifndef GM_ORDER_H
#define GM_ORDER_H

#include "memory.h"
#include "problem.h"
#include "trace.h"

#include <stdint.h>

/* python */
/* Runs of an order at most: 64 MiB. A guest of 1 TiB whose working set of 16 GiB is scattered page by page needs as many. */
#define GM_ORDER_RUNS 4194304

/* A region of the trace. Its pages are found by their guest physical addresses. */
struct gm_order_region {
    uint64_t gpa;
    uint32_t page_shift;
};

struct gm_order_counters {
    uint64_t pages, runs;
    uint64_t outside; /* faults on what is no page of this memory */
    uint64_t left_out; /* faults for which there was no more room */
};

struct gm_order;

/* `m` must live as long as there is something to add. */
struct gm_order *gm_order_new(struct gm_memory *m, struct gm_problem *ret);
void gm_order_free(struct gm_order *o);
/* Puts the pages of a trace's faults behind those that are there. Returns -1 when there is no memory. */
int gm_order_add(struct gm_order *o, const struct gm_trace_record *records, uint64_t count,
                 const struct gm_order_region *regions, struct gm_problem *ret);
void gm_order_counters(const struct gm_order *o, struct gm_order_counters *out);
/* end python */

struct gm_order_run {
    uint64_t first;
    uint32_t region, count;
};

struct gm_order {
    struct gm_memory *memory;
    unsigned regions;
    struct gm_order_run *run;
    struct gm_order_counters n;
    uint64_t room; /* runs that `run` has room for */
    gm_word *seen[]; /* of each region: the pages that some run has */
};

#endif
