/* What memory.c and adopt.c share: the state as it lies in its memfd, and gm_memory around it. */
#ifndef GM_MEMORY_LAYOUT_H
#define GM_MEMORY_LAYOUT_H

#include "memory.h"

#ifndef GM_STATE_VERSION
#define GM_STATE_VERSION 2
#endif

extern const char gm_state_magic[8];

/* The frame that a lane has in its slot: as one word, count 7 bits, region 16 bits, first page 40 bits (4 PiB of base pages). */
struct gm_span {
    uint64_t first;
    unsigned region, count;
};

static inline uint64_t gm_span_word(struct gm_span span)
{
    return span.first << 23 | (uint64_t)span.region << 7 | span.count;
}

static inline struct gm_span gm_span_read(uint64_t word)
{
    return (struct gm_span){word >> 23, (unsigned)(word >> 7 & 0xffff), (unsigned)(word & 127)};
}

/* A gm_memory that owns the mapping of `state`, even if it fails; its regions are bound one by one. */
struct gm_memory *gm_memory_around(struct gm_state *state, struct gm_problem *ret);
void gm_memory_bind(struct gm_memory *m, unsigned region, int fd, int uffd);

#endif
