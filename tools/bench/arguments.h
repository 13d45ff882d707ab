/* The command line of the bench programs; each uses what it needs of it. */
#ifndef GMEMD_BENCH_ARGUMENTS_H
#define GMEMD_BENCH_ARGUMENTS_H

#include <stdbool.h>
#include <stdint.h>

#include "../vmm/options.h"

struct arguments {
    struct options machine; /* memory, backing and daemon, in the words of the reference VMM */
    const char *source;     /* a file with the content of guest memory */
    unsigned threads;       /* that touch, or streams that carry */
    uint64_t touches;       /* of all threads together; 0: until the migration is done */
    uint64_t think_ns;      /* that a thread computes between two touches */
    uint32_t stride;        /* pages from one touch to the next */
    const char *stages;     /* a file for when each touch that waited began and ended */
    const char *image;      /* what a vCPU runs, in place of threads that touch */
    bool random;
    bool sleep; /* instead of polling */
};

struct arguments arguments_parse(int argc, char **argv);

#endif
