/* The state that travels beside memory: an opaque blob to everybody else. */
#ifndef GMEMD_VMM_STATE_H
#define GMEMD_VMM_STATE_H

#include "machine.h"

/* Counts up with every change of what a blob contains. */
enum { STATE_VERSION = 1 };

struct state {
    char magic[8];
    uint32_t version;
    uint32_t guest; /* enum guest_kind */
    uint64_t size;  /* of the blob: vcpu[] holds as many as there are */
    uint64_t checksum;
    uint64_t program; /* checksum of the guest program: both sides must be one build */
    uint64_t memory;
    uint64_t vcpus;
    uint64_t stopped_ns; /* CLOCK_MONOTONIC at the guest's last instruction */
    struct guest_workload workload;
    struct vcpu_state vcpu[GUEST_VCPUS];
};

/* The state of a stopped machine, in a sealed memfd. */
int state_save(struct machine *machine);

/* Reads the blob in `fd` and checks that it is one for this machine; ends the process if not. */
struct state state_load(int fd, const struct machine *machine);

#endif
