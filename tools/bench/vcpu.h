/*
 * The program of image.c on a vCPU of KVM that does not boot. Its low memory is our own; what it touches is a guest's
 * memory, behind IMAGE_MEMORY.
 */
#ifndef GMEMD_BENCH_VCPU_H
#define GMEMD_BENCH_VCPU_H

#include "../vmm/machine.h"
#include "image.h"
#include "samples.h"

struct bench_vcpu {
    struct machine machine; /* of which only KVM's part is used */
    const struct image_told *told;
};

struct bench_vcpu *vcpu_create(const char *image, const struct memory *memory);
/* Runs the program to its end, or until it is stopped. Ends the process if content was wrong. */
void vcpu_run(const struct bench_vcpu *guest);
/* Stops the vCPU that this thread runs, or is about to run. */
void vcpu_stop(const struct bench_vcpu *guest, pthread_t thread);
/* Returns how many touches there were, and adds how long each took that waited, by the guest's own clock. */
uint64_t vcpu_touches(const struct bench_vcpu *guest, struct samples *waits);

#endif
