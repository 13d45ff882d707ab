/* The end of a run: the guest checks its memory, then the host does; "verified" says it all. */
#ifndef GMEMD_VMM_VERIFY_H
#define GMEMD_VMM_VERIFY_H

#include "machine.h"

/* What a destination knows more than a guest that has always been here. */
struct arrival {
    uint64_t steps[GUEST_VCPUS]; /* at the switch */
    double ticks_per_us;
    double blocked_us;    /* what all vCPUs waited, from the first instruction to done */
    double blocked_share; /* of the time that they had */
};

/* Returns EX_OK or EX_DATAERR. `arrival` is NULL for a guest that has always been here. */
int verify(struct machine *machine, const struct arrival *arrival, char *const *paths,
           unsigned path_count);

/* Reports the wrong byte that a vCPU has found. */
void verify_report_wrong(const struct machine *machine, unsigned vcpu);

#endif
