/*
 * The machine: guest memory and its vCPUs, each on a thread of its own, be it a vCPU of KVM or a
 * thread that stands in for one. The main thread starts and stops them; they tell it by notes
 * through a pipe why they came to rest.
 */
#ifndef GMEMD_VMM_MACHINE_H
#define GMEMD_VMM_MACHINE_H

#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>

#include "memory.h"
#include "userfault.h"

/* What must travel with a vCPU besides memory. Of a stand-in that is only the step counter. */
struct vcpu_state {
    uint64_t steps;
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    struct kvm_fpu fpu;
    struct kvm_vcpu_events events;
};

struct machine;

struct vcpu {
    struct machine *machine;
    unsigned id;
    pthread_t thread;
    bool going;       /* under the machine's lock: the thread may run the guest */
    bool ended;       /* under the lock: it found a wrong byte or has verified its memory */
    atomic_bool stop; /* the thread is to leave the guest */
    uint64_t started_ns, stopped_ns;
    uint64_t pace_ns; /* when the next steps are due, where the rate is limited */
    int fd;
    struct kvm_run *run;
    struct guest_thread standin;
};

/* A vCPU left its program and waits. */
struct note {
    unsigned vcpu;
    enum guest_exit reason;
};

struct machine {
    enum guest_kind guest;
    struct memory memory;
    struct userfault userfault;
    struct guest_params params; /* the host's own copy */
    unsigned vcpus;
    struct vcpu vcpu[GUEST_VCPUS];
    int kvm, vm;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int notes[2];
    unsigned ended; /* vCPUs whose last note was read: a wrong byte, or all verified */
};

/* Makes the machine, memory untouched, and threads that wait for machine_go(). */
void machine_create(struct machine *machine, const struct options *options);

/* The source: the first state of a machine. The destination: that of another. */
void machine_reset(struct machine *machine, const struct guest_workload *workload);
void machine_restore(struct machine *machine, const struct guest_workload *workload,
                     const struct vcpu_state *states);

void machine_go(struct machine *machine);
/* Stops all vCPUs wherever they are, and returns when nothing of the guest runs. */
void machine_stop(struct machine *machine);
void machine_save(struct machine *machine, struct vcpu_state *ret);

/* When the first vCPU entered the guest (waits for that), and when the last one left it. */
uint64_t machine_started_ns(struct machine *machine);
uint64_t machine_stopped_ns(const struct machine *machine);

/* Waits for the next note; notes[0] polls readable when there is one. */
struct note machine_next_note(struct machine *machine);

/* Guest memory at a guest physical address. The guest may be writing there. */
struct guest_cpu *machine_cpu(const struct machine *machine, unsigned id);
void machine_command(struct machine *machine, enum guest_command command);
void machine_measure(struct machine *machine, bool measure);

struct json;
/* Adds "steps": the step counter of each vCPU. */
void machine_report_steps(const struct machine *machine, struct json *json);

/* For the two kinds of vCPU: the guest left its program; returns when it may go on. */
void vcpu_left(struct vcpu *vcpu, enum guest_exit reason);

void kvm_create_vm(struct machine *machine);
/* The slots of KVM, as --slot says. */
void slots_create(const struct machine *machine, const struct options *options);
void kvm_create_vcpu(struct vcpu *vcpu);
void kvm_reset_vcpu(const struct vcpu *vcpu, uint64_t entry, uint64_t stack, uint64_t tables);
void kvm_save_vcpu(const struct vcpu *vcpu, struct vcpu_state *ret);
void kvm_restore_vcpu(const struct vcpu *vcpu, const struct vcpu_state *state);
void kvm_run_vcpu(struct vcpu *vcpu); /* until it is told to stop */

void standin_run_vcpu(struct vcpu *vcpu);

#endif
