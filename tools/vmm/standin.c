/* Threads that stand in for vCPUs: they run the guest program on the host's mapping of memory. */
#include "machine.h"

static void standin_leave(struct guest_thread *thread, enum guest_exit reason)
{
    struct vcpu *vcpu = (struct vcpu *)(void *)((char *)thread - offsetof(struct vcpu, standin));

    vcpu_left(vcpu, reason);
}

void standin_run_vcpu(struct vcpu *vcpu)
{
    vcpu->standin.leave = standin_leave;
    guest_program((uintptr_t)vcpu->machine->memory.base, vcpu->id, &vcpu->standin);
}
