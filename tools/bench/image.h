/*
 * Where things lie in the memory of a guest that runs on a vCPU, be it QEMU's or our own. The first part is the guest's
 * program and what it writes down; all that is touched comes behind.
 */
#ifndef GMEMD_BENCH_IMAGE_H
#define GMEMD_BENCH_IMAGE_H

#include <stdint.h>

enum {
    IMAGE_TABLES = 512 << 10, /* page tables and stack of a vCPU that does not boot */
    IMAGE_STACK = 1020 << 10,
    IMAGE_AT = 1 << 20, /* as in image.ld */
    IMAGE_ENTRY = IMAGE_AT + 16, /* where such a vCPU begins: at the touching */
    IMAGE_TOLD = 4 << 20,
    IMAGE_MEMORY = 16 << 20,
    IMAGE_PORT = 0x402, /* QEMU's debug port, for the letters below */
    IMAGE_WAITS = (IMAGE_MEMORY - IMAGE_TOLD) / 8 - 8,
};

/* What the guest says: its memory has its content; a page has not; it has made its touches. */
enum { IMAGE_FILLED = 'F', IMAGE_WRONG = 'W', IMAGE_ENDED = 'E' };

/* At IMAGE_TOLD. Times are in cycles of the time stamp counter. */
struct image_told {
    uint64_t touches, begin, end;
    uint64_t wrong_page, wrong_found;
    uint64_t waits; /* touches that took WAIT_CYCLES and longer */
    uint64_t wait[IMAGE_WAITS];
};

_Static_assert(IMAGE_TOLD + sizeof(struct image_told) <= IMAGE_MEMORY, "what is told ends before what is touched");

#endif
