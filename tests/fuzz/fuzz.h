/*
 * What the fuzzed targets share. Each target is one C file that defines LLVMFuzzerTestOneInput(): libFuzzer drives it, or main.c does
 * where there is no clang. A target aborts when something does not hold.
 */
#ifndef GM_FUZZ_H
#define GM_FUZZ_H

#include "gmemd/native/frame.h"
#include "gmemd/native/memory.h"
#include "gmemd/native/problem.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define must(holds)                                                                                                \
    do {                                                                                                           \
        if (!(holds)) {                                                                                            \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #holds);                             \
            abort();                                                                                               \
        }                                                                                                          \
    } while (0)

/* The rest of an input. What is taken beyond its end is zero. */
struct fuzz_input {
    const uint8_t *at, *end;
};

uint64_t fuzz_take(struct fuzz_input *in, unsigned bytes);
static inline bool fuzz_more(const struct fuzz_input *in)
{
    return in->at < in->end;
}

/*
 * A guest of two regions in one memory file: FUZZ_PAGES base pages and FUZZ_BIG_PAGES of twice that size. Before, between and behind
 * them lie pages that belong to no region, and must stay as they are.
 */
enum { FUZZ_PAGE = 4096, FUZZ_PAGES = 70, FUZZ_BIG_PAGES = 3 };

struct fuzz_guest {
    int file;
    struct gm_memory *memory;
};

struct fuzz_guest fuzz_guest_new(int populate);
/* Aborts if anything outside the regions was written. */
void fuzz_guest_check(const struct fuzz_guest *g);
/* A number that stands for the content of a page. */
uint32_t fuzz_guest_page(const struct fuzz_guest *g, unsigned region, uint64_t page);
void fuzz_guest_free(struct fuzz_guest *g);

/* Takes a few bytes of the input for a frame of `kind`, most often one that is in order. Returns its length with payload. */
size_t fuzz_frame(struct fuzz_input *in, int kind, int checksum, unsigned char *out);
enum { FUZZ_FRAME_BYTES = GM_HEADER_BYTES + GM_FRAME_PAGES * FUZZ_PAGE };

#endif
