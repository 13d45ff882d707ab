/* The host's own check of all guest memory, once the guest is at rest. */
#ifndef GMEMD_VMM_CHECK_H
#define GMEMD_VMM_CHECK_H

#include "machine.h"

struct check {
    uint64_t host_verified;  /* pages of the low area that are right */
    uint64_t mismatches;     /* pages of all memory that are wrong, or differ from the source's */
    uint64_t against_source; /* pages compared with the source's memory */
    struct {
        uint64_t address, expected, found;
    } first_wrong; /* of the mismatches, in words */
};

/*
 * `switched` has the step counters of the switch, or is NULL where the guest has always been here.
 * `paths` are the source's memory files, as many as the machine has, or none.
 */
struct check check_memory(const struct machine *machine, const uint64_t *switched,
                          char *const *paths, unsigned path_count);

#endif
