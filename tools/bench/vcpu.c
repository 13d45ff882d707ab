/*
 * The vCPU begins where the guest in QEMU is after it has booted: in 64-bit mode and user mode. It is stopped by a kick
 * that stays set, so none is lost between two entries.
 */
#include "vcpu.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "../vmm/base.h"
#include "../vmm/layout.h"

enum { LOW_SLOT, MEMORY_SLOT };

static void add_slot(const struct machine *machine, unsigned slot, uint64_t gpa, void *memory, uint64_t size)
{
    struct kvm_userspace_memory_region region = {
        .slot = slot,
        .guest_phys_addr = gpa,
        .memory_size = size,
        .userspace_addr = (uintptr_t)memory,
    };

    if (ioctl(machine->vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
        fail(EX_UNAVAILABLE, "KVM_SET_USER_MEMORY_REGION %u: %s", slot, strerror(errno));
}

static uint8_t *create_low(const char *image, uint64_t memory_size)
{
    CLEANUP_CLOSE int file = open(image, O_RDONLY | O_CLOEXEC);
    uint8_t *low = mmap(NULL, IMAGE_MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

    if (low == MAP_FAILED)
        fail(EX_OSERR, "the guest's low memory: %s", strerror(errno));
    if (file < 0 || read(file, low + IMAGE_AT, IMAGE_TOLD - IMAGE_AT) <= 0)
        fail(EX_NOINPUT, "--vcpu %s: %s", image, strerror(errno));
    layout_tables(low, IMAGE_TABLES, IMAGE_MEMORY + memory_size);
    return low;
}

static void kicked(int signal)
{
    (void)signal;
}

/* Runs the guest up to what it says next; false if it was stopped. */
static bool enter(const struct vcpu *vcpu, char *ret)
{
    struct kvm_run *run = vcpu->run;

    while (ioctl(vcpu->fd, KVM_RUN, 0) < 0) {
        if (errno != EINTR)
            fail(EX_SOFTWARE, "KVM_RUN: %s", strerror(errno));
        if (__atomic_load_n(&run->immediate_exit, __ATOMIC_RELAXED))
            return false;
    }
    if (run->exit_reason != KVM_EXIT_IO || run->io.port != IMAGE_PORT)
        fail(EX_SOFTWARE, "the vCPU left the guest for KVM's exit reason %u", run->exit_reason);
    *ret = *((const char *)run + run->io.data_offset);
    return true;
}

struct bench_vcpu *vcpu_create(const char *image, const struct memory *memory)
{
    struct bench_vcpu *guest = allocate(1, sizeof(*guest));
    struct machine *machine = &guest->machine;
    struct vcpu *vcpu = &machine->vcpu[0];
    uint8_t *low = create_low(image, memory->size);
    struct sigaction action = {.sa_handler = kicked};

    sigaction(SIGUSR1, &action, NULL);
    guest->told = (struct image_told *)(void *)(low + IMAGE_TOLD);
    kvm_create_vm(machine);
    add_slot(machine, LOW_SLOT, 0, low, IMAGE_MEMORY);
    add_slot(machine, MEMORY_SLOT, IMAGE_MEMORY, memory->base, memory->size);
    vcpu->machine = machine;
    kvm_create_vcpu(vcpu);
    kvm_reset_vcpu(vcpu, IMAGE_ENTRY, IMAGE_STACK, IMAGE_TABLES);
    return guest;
}

void vcpu_run(const struct bench_vcpu *guest)
{
    char said = 0;

    while (said != IMAGE_ENDED && enter(&guest->machine.vcpu[0], &said))
        if (said == IMAGE_WRONG)
            fail(EX_DATAERR, "page %llu holds %llu", (unsigned long long)guest->told->wrong_page,
                 (unsigned long long)guest->told->wrong_found);
}

void vcpu_stop(const struct bench_vcpu *guest, pthread_t thread)
{
    __atomic_store_n(&guest->machine.vcpu[0].run->immediate_exit, 1, __ATOMIC_RELAXED);
    pthread_kill(thread, SIGUSR1);
}

uint64_t vcpu_touches(const struct bench_vcpu *guest, struct samples *waits)
{
    int khz = ioctl(guest->machine.vcpu[0].fd, KVM_GET_TSC_KHZ, 0);

    if (khz <= 0)
        fail(EX_UNAVAILABLE, "KVM_GET_TSC_KHZ: %s", strerror(errno));
    for (uint64_t i = 0; i < guest->told->waits; i++)
        samples_add(waits, guest->told->wait[i] * 1000000 / (uint64_t)khz);
    return guest->told->touches;
}
