#include "machine.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/resource.h>

#include "base.h"
#include "json.h"
#include "layout.h"

static const uint64_t SECOND = 1000000000;

/* The run area of this thread's vCPU, for the signal handler. NULL in a stand-in. */
static __thread struct kvm_run *current_run;

/* A signal ends KVM_RUN with EINTR; immediate_exit is for one that came just before. */
static void kicked(int signal)
{
    (void)signal;
    if (current_run)
        current_run->immediate_exit = 1;
}

static void wait_for_go(struct vcpu *vcpu)
{
    while (!vcpu->going)
        pthread_cond_wait(&vcpu->machine->changed, &vcpu->machine->lock);
}

/* Where CPUs are few and emulated, guests that run at full speed would leave nothing to all else. */
static void take_niceness(void)
{
    const char *wanted = getenv("GMEMD_VMM_NICE");

    if (wanted && setpriority(PRIO_PROCESS, (id_t)gettid(), atoi(wanted)) < 0)
        fail(EX_OSERR, "GMEMD_VMM_NICE=%s: %s", wanted, strerror(errno));
}

static void *vcpu_main(void *argument)
{
    struct vcpu *vcpu = argument;
    struct machine *machine = vcpu->machine;

    take_niceness();
    current_run = vcpu->run;
    for (;;) {
        pthread_mutex_lock(&machine->lock);
        wait_for_go(vcpu);
        vcpu->started_ns = now_ns();
        pthread_cond_broadcast(&machine->changed);
        pthread_mutex_unlock(&machine->lock);
        if (machine->guest == GUEST_KVM)
            kvm_run_vcpu(vcpu);
        else
            standin_run_vcpu(vcpu);
        vcpu->stopped_ns = now_ns();
        pthread_mutex_lock(&machine->lock);
        vcpu->going = false;
        pthread_cond_broadcast(&machine->changed);
        pthread_mutex_unlock(&machine->lock);
    }
    return NULL;
}

/* Holds back a vCPU whose rate is limited. One that waited for its memory does not catch up. */
static void keep_pace(struct vcpu *vcpu)
{
    const struct guest_workload *workload = &vcpu->machine->params.workload;
    uint64_t now = now_ns(), due = vcpu->pace_ns;
    struct timespec until;

    vcpu->pace_ns = (due > now ? due : now) + workload->pace * SECOND / workload->rate;
    until.tv_sec = (time_t)(due / SECOND);
    until.tv_nsec = (long)(due % SECOND);
    pthread_mutex_lock(&vcpu->machine->lock);
    while (!atomic_load(&vcpu->stop) && now_ns() < due)
        pthread_cond_timedwait(&vcpu->machine->changed, &vcpu->machine->lock, &until);
    pthread_mutex_unlock(&vcpu->machine->lock);
}

void vcpu_left(struct vcpu *vcpu, enum guest_exit reason)
{
    struct note note = {.vcpu = vcpu->id, .reason = reason};

    if (reason == GUEST_PACE) {
        keep_pace(vcpu);
        return;
    }
    pthread_mutex_lock(&vcpu->machine->lock);
    vcpu->going = false;
    vcpu->ended = reason == GUEST_WRONG || reason == GUEST_VERIFIED;
    pthread_cond_broadcast(&vcpu->machine->changed);
    if (write(vcpu->machine->notes[1], &note, sizeof(note)) != sizeof(note))
        fail(EX_OSERR, "vCPU %u cannot tell that it came to rest: %s", vcpu->id, strerror(errno));
    wait_for_go(vcpu);
    pthread_mutex_unlock(&vcpu->machine->lock);
}

static void create_threads(struct machine *machine)
{
    struct sigaction action = {.sa_handler = kicked};
    pthread_condattr_t monotonic;

    sigaction(SIGUSR1, &action, NULL);
    pthread_mutex_init(&machine->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&machine->changed, &monotonic);
    if (pipe2(machine->notes, O_CLOEXEC) < 0)
        fail(EX_OSERR, "a pipe for the vCPUs: %s", strerror(errno));
    for (unsigned i = 0; i < machine->vcpus; i++) {
        int error = pthread_create(&machine->vcpu[i].thread, NULL, vcpu_main, &machine->vcpu[i]);

        if (error)
            fail(EX_OSERR, "a thread for vCPU %u: %s", i, strerror(error));
    }
}

void machine_create(struct machine *machine, const struct options *options)
{
    *machine = (struct machine){
        .guest = options->guest, .vcpus = options->vcpus, .kvm = -1, .vm = -1};
    if (machine->guest == GUEST_KVM)
        kvm_create_vm(machine);
    machine->memory = memory_create(options, machine->vm);
    if (options->slot == SLOT_GUEST_MEMFD && options->destination)
        userfault_create(&machine->userfault, &machine->memory, options, machine->kvm);
    if (machine->guest == GUEST_KVM)
        slots_create(machine, options);
    for (unsigned i = 0; i < machine->vcpus; i++) {
        machine->vcpu[i].machine = machine;
        machine->vcpu[i].id = i;
        if (machine->guest == GUEST_KVM)
            kvm_create_vcpu(&machine->vcpu[i]);
    }
    create_threads(machine);
}

void machine_reset(struct machine *machine, const struct guest_workload *workload)
{
    machine->params = layout_params(workload, machine->memory.size, machine->vcpus);
    layout_build(&machine->params, machine->memory.base);
    for (unsigned i = 0; machine->guest == GUEST_KVM && i < machine->vcpus; i++)
        kvm_reset_vcpu(&machine->vcpu[i], layout_entry(&machine->params),
                       layout_stack(&machine->params, i), machine->params.tables);
}

void machine_restore(struct machine *machine, const struct guest_workload *workload,
                     const struct vcpu_state *states)
{
    machine->params = layout_params(workload, machine->memory.size, machine->vcpus);
    for (unsigned i = 0; i < machine->vcpus; i++) {
        machine->vcpu[i].standin.filled = true;
        machine->vcpu[i].standin.step = states[i].steps;
        if (machine->guest == GUEST_KVM)
            kvm_restore_vcpu(&machine->vcpu[i], &states[i]);
    }
}

void machine_go(struct machine *machine)
{
    pthread_mutex_lock(&machine->lock);
    for (unsigned i = 0; i < machine->vcpus; i++) {
        struct vcpu *vcpu = &machine->vcpu[i];

        atomic_store(&vcpu->stop, false);
        __atomic_store_n(&vcpu->standin.stop, 0, __ATOMIC_RELAXED);
        vcpu->going = !vcpu->ended;
    }
    pthread_cond_broadcast(&machine->changed);
    pthread_mutex_unlock(&machine->lock);
}

void machine_stop(struct machine *machine)
{
    pthread_mutex_lock(&machine->lock);
    for (unsigned i = 0; i < machine->vcpus; i++) {
        struct vcpu *vcpu = &machine->vcpu[i];

        atomic_store(&vcpu->stop, true);
        __atomic_store_n(&vcpu->standin.stop, 1, __ATOMIC_RELAXED);
        pthread_kill(vcpu->thread, SIGUSR1);
    }
    pthread_cond_broadcast(&machine->changed);
    for (unsigned i = 0; i < machine->vcpus; i++)
        while (machine->vcpu[i].going)
            pthread_cond_wait(&machine->changed, &machine->lock);
    pthread_mutex_unlock(&machine->lock);
}

void machine_save(struct machine *machine, struct vcpu_state *ret)
{
    for (unsigned i = 0; i < machine->vcpus; i++) {
        ret[i] = (struct vcpu_state){.steps = machine_cpu(machine, i)->steps};
        if (machine->guest == GUEST_KVM)
            kvm_save_vcpu(&machine->vcpu[i], &ret[i]);
    }
}

static uint64_t first_start(const struct machine *machine)
{
    uint64_t first = 0;

    for (unsigned i = 0; i < machine->vcpus; i++) {
        uint64_t start = machine->vcpu[i].started_ns;

        if (start && (!first || start < first))
            first = start;
    }
    return first;
}

uint64_t machine_started_ns(struct machine *machine)
{
    uint64_t first;

    pthread_mutex_lock(&machine->lock);
    while (!(first = first_start(machine)))
        pthread_cond_wait(&machine->changed, &machine->lock);
    pthread_mutex_unlock(&machine->lock);
    return first;
}

uint64_t machine_stopped_ns(const struct machine *machine)
{
    uint64_t last = 0;

    for (unsigned i = 0; i < machine->vcpus; i++)
        if (machine->vcpu[i].stopped_ns > last)
            last = machine->vcpu[i].stopped_ns;
    return last;
}

struct note machine_next_note(struct machine *machine)
{
    struct note note;

    if (read(machine->notes[0], &note, sizeof(note)) != sizeof(note))
        fail(EX_OSERR, "reading what vCPUs tell: %s", strerror(errno));
    machine->ended += note.reason == GUEST_WRONG || note.reason == GUEST_VERIFIED;
    return note;
}

struct guest_cpu *machine_cpu(const struct machine *machine, unsigned id)
{
    uint64_t address = machine->params.cpus + id * GUEST_PAGE;

    return (struct guest_cpu *)(void *)(machine->memory.base + address);
}

static struct guest_params *live_params(const struct machine *machine)
{
    return (struct guest_params *)(void *)(machine->memory.base + GUEST_PARAMS);
}

void machine_command(struct machine *machine, enum guest_command command)
{
    __atomic_store_n(&live_params(machine)->command, command, __ATOMIC_RELEASE);
}

void machine_measure(struct machine *machine, bool measure)
{
    __atomic_store_n(&live_params(machine)->measure, measure, __ATOMIC_RELEASE);
}

void machine_report_steps(const struct machine *machine, struct json *json)
{
    json_open(json, "steps", '[');
    for (unsigned i = 0; i < machine->vcpus; i++)
        json_number(json, NULL, machine_cpu(machine, i)->steps);
    json_close(json, ']');
}
