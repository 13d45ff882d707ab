/*
 * vCPUs of KVM. They start in 64-bit mode, with page tables that the host has put into guest memory,
 * and have no devices and no interrupts: all that they ever ask of the host is an `out` to one port.
 *
 * They run in user mode. A KVM that has no hardware below it, as inside of another VM, emulates what
 * runs in supervisor mode, instruction by instruction and some hundred times slower.
 *
 * An `out` is complete only when KVM_RUN is entered again. So a vCPU always leaves for good through
 * a KVM_RUN that returns EINTR: then its registers are those between two instructions.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "base.h"
#include "machine.h"
#include "uapi.h"

enum {
    CR0 = 0x80000033, /* PG, NE, ET, MP, PE */
    CR4 = 0x20,       /* PAE */
    EFER = 0x500,     /* LMA, LME */
    RFLAGS = 0x3002,  /* IOPL 3: `out` is allowed to user mode; and the bit that is always set */
    USER = 3,         /* privilege level */
    CPUID_ENTRIES = 256,
};

void kvm_create_vm(struct machine *machine)
{
    machine->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (machine->kvm < 0)
        fail(EX_UNAVAILABLE, "/dev/kvm: %s: use --guest threads where there is no KVM",
             strerror(errno));
    if (ioctl(machine->kvm, KVM_GET_API_VERSION, 0) != KVM_API_VERSION)
        fail(EX_UNAVAILABLE, "/dev/kvm speaks another version than %d", KVM_API_VERSION);
    machine->vm = ioctl(machine->kvm, KVM_CREATE_VM, 0);
    if (machine->vm < 0)
        fail(EX_UNAVAILABLE, "KVM_CREATE_VM: %s", strerror(errno));
}

static void set_cpuid(const struct vcpu *vcpu)
{
    CLEANUP_FREE struct kvm_cpuid2 *cpuid =
        allocate(1, sizeof(*cpuid) + CPUID_ENTRIES * sizeof(cpuid->entries[0]));

    cpuid->nent = CPUID_ENTRIES;
    if (ioctl(vcpu->machine->kvm, KVM_GET_SUPPORTED_CPUID, cpuid) < 0)
        fail(EX_UNAVAILABLE, "KVM_GET_SUPPORTED_CPUID: %s", strerror(errno));
    if (ioctl(vcpu->fd, KVM_SET_CPUID2, cpuid) < 0)
        fail(EX_UNAVAILABLE, "KVM_SET_CPUID2: %s", strerror(errno));
}

void kvm_create_vcpu(struct vcpu *vcpu)
{
    int size = ioctl(vcpu->machine->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);

    vcpu->fd = ioctl(vcpu->machine->vm, KVM_CREATE_VCPU, vcpu->id);
    if (vcpu->fd < 0 || size < 0)
        fail(EX_UNAVAILABLE, "KVM_CREATE_VCPU %u: %s", vcpu->id, strerror(errno));
    vcpu->run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
    if (vcpu->run == MAP_FAILED)
        fail(EX_OSERR, "mapping the run area of vCPU %u: %s", vcpu->id, strerror(errno));
    set_cpuid(vcpu);
}

static void vcpu_ioctl(const struct vcpu *vcpu, unsigned long request, const char *name,
                       void *argument)
{
    if (ioctl(vcpu->fd, request, argument) < 0)
        fail(EX_SOFTWARE, "vCPU %u: %s: %s", vcpu->id, name, strerror(errno));
}

#define VCPU_IOCTL(vcpu, request, argument) vcpu_ioctl(vcpu, request, #request, argument)

static void reset_segments(struct kvm_sregs *sregs)
{
    struct kvm_segment code = {
        .limit = 0xffffffff,
        .selector = 0x8 | USER,
        .dpl = USER,
        .type = 11, /* code, readable, accessed */
        .present = 1,
        .s = 1,
        .l = 1,
        .g = 1,
    };
    struct kvm_segment data = code;

    data.selector = 0x10 | USER;
    data.type = 3; /* data, writable, accessed */
    data.l = 0;
    data.db = 1;
    sregs->cs = code;
    sregs->ds = sregs->es = sregs->fs = sregs->gs = sregs->ss = data;
}

void kvm_reset_vcpu(const struct vcpu *vcpu, uint64_t entry, uint64_t stack, uint64_t tables)
{
    struct kvm_regs regs = {
        .rip = entry,
        .rsp = stack,
        .rflags = RFLAGS,
        .rsi = vcpu->id, /* guest_program(0, id, NULL) */
    };
    struct kvm_sregs sregs;

    VCPU_IOCTL(vcpu, KVM_GET_SREGS, &sregs);
    reset_segments(&sregs);
    sregs.cr0 = CR0;
    sregs.cr3 = tables;
    sregs.cr4 = CR4;
    sregs.efer = EFER;
    VCPU_IOCTL(vcpu, KVM_SET_SREGS, &sregs);
    VCPU_IOCTL(vcpu, KVM_SET_REGS, &regs);
}

void kvm_save_vcpu(const struct vcpu *vcpu, struct vcpu_state *ret)
{
    VCPU_IOCTL(vcpu, KVM_GET_REGS, &ret->regs);
    VCPU_IOCTL(vcpu, KVM_GET_SREGS, &ret->sregs);
    VCPU_IOCTL(vcpu, KVM_GET_FPU, &ret->fpu);
    VCPU_IOCTL(vcpu, KVM_GET_VCPU_EVENTS, &ret->events);
}

void kvm_restore_vcpu(const struct vcpu *vcpu, const struct vcpu_state *state)
{
    struct vcpu_state copy = *state;

    VCPU_IOCTL(vcpu, KVM_SET_SREGS, &copy.sregs);
    VCPU_IOCTL(vcpu, KVM_SET_REGS, &copy.regs);
    VCPU_IOCTL(vcpu, KVM_SET_FPU, &copy.fpu);
    VCPU_IOCTL(vcpu, KVM_SET_VCPU_EVENTS, &copy.events);
}

__attribute__((noreturn)) static void fail_exit(const struct vcpu *vcpu)
{
    struct kvm_regs regs = {0};

    ioctl(vcpu->fd, KVM_GET_REGS, &regs);
    fail(EX_SOFTWARE, "vCPU %u, at 0x%llx, left the guest for KVM's exit reason %u%s", vcpu->id,
         regs.rip, vcpu->run->exit_reason,
         vcpu->run->exit_reason == KVM_EXIT_SHUTDOWN ? ": the code that it runs is damaged" : "");
}

/* A slot's bitmap says that the page is not there yet. */
static bool wants_page(const struct kvm_run *run, uint64_t *ret_gpa)
{
    struct memory_fault fault;

    memcpy(&fault, &run->hw, sizeof(fault));
    *ret_gpa = fault.gpa;
    return run->exit_reason == KVM_EXIT_MEMORY_FAULT &&
           fault.flags & KVM_MEMORY_EXIT_FLAG_USERFAULT;
}

void kvm_run_vcpu(struct vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    uint64_t gpa;

    for (;;) {
        run->immediate_exit = 0;
        if (atomic_load(&vcpu->stop)) /* after the line above: a kick between them is not lost */
            run->immediate_exit = 1;
        if (ioctl(vcpu->fd, KVM_RUN, 0) < 0) {
            if (errno == EFAULT && wants_page(run, &gpa)) {
                userfault_resolve(vcpu, gpa);
                continue;
            }
            if (errno != EINTR)
                fail(EX_SOFTWARE, "vCPU %u: KVM_RUN: %s", vcpu->id, strerror(errno));
            if (atomic_load(&vcpu->stop))
                return;
        } else if (run->exit_reason == KVM_EXIT_IO && run->io.port == GUEST_PORT) {
            vcpu_left(vcpu, *(uint32_t *)(void *)((char *)run + run->io.data_offset));
        } else {
            fail_exit(vcpu);
        }
    }
}
