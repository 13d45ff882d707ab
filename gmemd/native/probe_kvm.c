/*
 * KVM, tried out on a VM of one slot. No vCPU runs.
 *
 * A capability number is no proof: 245, which the proposed KVM userfault uses, means something else
 * in mainline. What is asked for is therefore done, with the same thing done without it beside it,
 * so that a refusal can be told from a bad slot.
 */
#include "probe.h"

#include "cleanup.h"
#include "probe_arena.h"
#include "uapi.h"

#include <fcntl.h>
#include <sys/ioctl.h>

/* KVM_CREATE_VM and KVM_PRE_FAULT_MEMORY end early when a signal comes. */
#define ATTEMPTS 10
/* Not an address of user space on any CPU, but aligned. */
#define NOWHERE (UINT64_C(1) << 63)

static int open_kvm(const char **step)
{
    *step = "open /dev/kvm";
    return open("/dev/kvm", O_RDWR | O_CLOEXEC);
}

int gm_probe_make_vm(const char **step)
{
    gm_auto_fd kvm = open_kvm(step);
    int vm = -1;

    if (kvm < 0)
        return -1;
    *step = "KVM_CREATE_VM";
    for (int i = 0; i < ATTEMPTS && vm < 0; i++) {
        vm = ioctl(kvm, KVM_CREATE_VM, 0);
        if (vm < 0 && errno != EINTR)
            break;
    }
    return vm;
}

int gm_probe_make_guest_memfd(int vm, size_t size, uint64_t flags, const char **step)
{
    struct kvm_create_guest_memfd request = {.size = size, .flags = flags};

    *step = "KVM_CREATE_GUEST_MEMFD";
    return ioctl(vm, KVM_CREATE_GUEST_MEMFD, &request);
}

struct gm_trial gm_probe_kvm(void)
{
    const char *step;
    gm_auto_fd kvm = open_kvm(&step);
    int version;

    if (kvm < 0)
        return gm_trial_no(step, errno);
    version = ioctl(kvm, KVM_GET_API_VERSION, 0);
    if (version < 0)
        return gm_trial_no("KVM_GET_API_VERSION", errno);
    return (struct gm_trial){
        .ok = version == KVM_API_VERSION, .value = version, .step = "KVM_GET_API_VERSION"};
}

struct gm_trial gm_probe_kvm_vm(void)
{
    const char *step;
    gm_auto_fd vm = gm_probe_make_vm(&step);

    return gm_trial_call(vm, step);
}

struct gm_trial gm_probe_guest_memfd(unsigned long long flags)
{
    const char *step;
    gm_auto_fd vm = gm_probe_make_vm(&step);

    if (vm < 0)
        return gm_trial_untried(step, errno);
    gm_auto_fd file = gm_probe_make_guest_memfd(vm, (size_t)sysconf(_SC_PAGESIZE), flags, &step);

    return gm_trial_call(file, step);
}

/* Opens the arena and sees to it that there is a VM. */
static struct gm_trial set_up(struct gm_arena *arena, int backing)
{
    struct gm_trial trial = gm_arena_open(arena, backing);
    const char *step = "";

    if (trial.ok == 1 && arena->vm < 0)
        arena->vm = gm_probe_make_vm(&step);
    if (trial.ok == 1 && arena->vm < 0)
        return gm_trial_untried(step, errno);
    return trial;
}

/* Slot 0 at guest address 0; with `size` 0, takes it away. */
static int set_slot(const struct gm_arena *arena, uint32_t flags, uint64_t size, uint64_t bitmap)
{
    struct gmemd_kvm_memory_region2 slot = {
        .flags = flags,
        .memory_size = size,
        .userspace_addr = (uint64_t)(uintptr_t)arena->range,
        .guest_memfd = flags & KVM_MEM_GUEST_MEMFD ? (uint32_t)arena->file : 0,
        .userfault_bitmap = bitmap,
    };

    return ioctl(arena->vm, GMEMD_KVM_SET_USER_MEMORY_REGION2, &slot);
}

static int set_plain_slot(const struct gm_arena *arena)
{
    struct kvm_userspace_memory_region slot = {
        .memory_size = arena->page,
        .userspace_addr = (uint64_t)(uintptr_t)arena->range,
    };

    return ioctl(arena->vm, KVM_SET_USER_MEMORY_REGION, &slot);
}

struct gm_trial gm_probe_slot(int backing, int in_slot)
{
    gm_auto_arena arena = GM_NO_ARENA;
    struct gm_trial trial = set_up(&arena, backing);

    if (trial.ok != 1)
        return trial;
    if (in_slot)
        return gm_trial_call(set_slot(&arena, KVM_MEM_GUEST_MEMFD, arena.page, 0),
                             "KVM_SET_USER_MEMORY_REGION2");
    return gm_trial_call(set_plain_slot(&arena), "KVM_SET_USER_MEMORY_REGION");
}

struct gm_trial gm_probe_kvm_userfault(void)
{
    gm_auto_arena arena = GM_NO_ARENA;
    struct gm_trial trial = set_up(&arena, GM_PROBE_GUEST_MEMFD);
    uint64_t bitmap = 1;

    if (trial.ok != 1)
        return trial;
    if (set_slot(&arena, KVM_MEM_GUEST_MEMFD, arena.page, 0) < 0)
        return gm_trial_untried("a guest_memfd slot without KVM_MEM_USERFAULT", errno);
    if (set_slot(&arena, KVM_MEM_GUEST_MEMFD, 0, 0) < 0)
        return gm_trial_untried("taking the slot away again", errno);
    if (set_slot(&arena, KVM_MEM_GUEST_MEMFD | KVM_MEM_USERFAULT, arena.page, NOWHERE) == 0)
        return gm_trial_no(
            "the flag is taken, but not for a bitmap: one that lies nowhere was accepted", 0);
    return gm_trial_call(set_slot(&arena, KVM_MEM_GUEST_MEMFD | KVM_MEM_USERFAULT, arena.page,
                                  (uint64_t)(uintptr_t)&bitmap),
                         "KVM_SET_USER_MEMORY_REGION2 with KVM_MEM_USERFAULT");
}

struct gm_trial gm_probe_prefault(void)
{
    gm_auto_arena arena = GM_NO_ARENA;
    struct gm_trial trial = set_up(&arena, GM_PROBE_MEMFD);
    struct kvm_pre_fault_memory request = {.size = arena.page};
    int result = -1;

    if (trial.ok != 1)
        return trial;
    if (set_plain_slot(&arena) < 0)
        return gm_trial_untried("KVM_SET_USER_MEMORY_REGION", errno);
    gm_auto_fd vcpu = ioctl(arena.vm, KVM_CREATE_VCPU, 0);

    if (vcpu < 0)
        return gm_trial_untried("KVM_CREATE_VCPU", errno);
    for (int i = 0; i < ATTEMPTS && result < 0; i++) {
        result = ioctl(vcpu, KVM_PRE_FAULT_MEMORY, &request);
        if (result < 0 && errno != EINTR && errno != EAGAIN)
            break;
    }
    return gm_trial_call(result, "KVM_PRE_FAULT_MEMORY");
}
