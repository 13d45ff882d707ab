/* The records in a block of a trace file, in few bytes each. docs/trace.md is the specification. */
#ifndef GM_TRACE_CODE_H
#define GM_TRACE_CODE_H

#include "problem.h"
#include "trace.h"

#include <stdint.h>

/* python */
/* The unit of times: exact enough for what takes microseconds, and a byte shorter than in ns. */
#define GM_TRACE_TICK_NS 100
/* The records of a block at most: some thousand faults, so that what damage costs is little. */
#define GM_TRACE_CODE_BYTES 8192
/* A record takes 3 bytes at least. */
#define GM_TRACE_CODE_RECORDS 2730

/*
 * Codes as many of the `n` records as fit into GM_TRACE_CODE_BYTES at `out`, counting times from
 * *tick, and sets *tick to the last one's and *length to the bytes. A time that is earlier than the
 * one before counts as that. `pages` tells how many each region has.
 * Returns how many records, or -1 if the first lies outside of all regions.
 */
int gm_trace_encode(const struct gm_trace_record *records, uint32_t n, const uint64_t *pages,
                    uint32_t regions, uint64_t *tick, uint8_t *out, uint32_t *length,
                    struct gm_problem *ret);

/*
 * The opposite; `out` has room for GM_TRACE_CODE_RECORDS. Returns how many records are sound. Where
 * one is not, the rest is not looked at, and the problem, else left alone, says what it is.
 */
int gm_trace_decode_untrusted(const uint8_t *in, uint32_t length, const uint64_t *pages,
                              uint32_t regions, uint64_t *tick, struct gm_trace_record *out,
                              struct gm_problem *ret);
/* end python */

#endif
