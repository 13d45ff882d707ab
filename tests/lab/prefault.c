/* KVM_PRE_FAULT_MEMORY: what mapping pages ahead of a vCPU costs, against the faults that KVM handles alone. */
#include "checks.h"

#include <sys/ioctl.h>

#define PAGES ((size_t)256)
#define CODE_PAGE ((size_t)1)
#define FIRST ((size_t)4)
#define TOUCHED ((size_t)240)
#define ROUNDS 20

/* In real mode, for the 240 pages from number 4 on:
 *      mov bx, 0x400; mov cx, 240
 *  1:  mov ds, bx; mov al, [0]; add bx, 0x100; dec cx; jnz 1b; hlt */
static const unsigned char code[] = {0xbb, 0x00, 0x04, 0xb9, 0xf0, 0x00, 0x8e, 0xdb, 0xa0, 0x00,
                                     0x00, 0x81, 0xc3, 0x00, 0x01, 0x49, 0x75, 0xf4, 0xf4};

static void set_slot(int file, void *mapping, size_t size)
{
    struct gmemd_kvm_memory_region2 slot = {
        .flags = KVM_MEM_GUEST_MEMFD,
        .memory_size = size,
        .userspace_addr = (uint64_t)(uintptr_t)mapping,
        .guest_memfd = (uint32_t)file,
    };

    DO(ioctl(the_vm(), GMEMD_KVM_SET_USER_MEMORY_REGION2, &slot));
}

static void map_ahead(int vcpu)
{
    struct kvm_pre_fault_memory range = {.gpa = FIRST * PAGE, .size = TOUCHED * PAGE};

    while (range.size)
        if (ioctl(vcpu, KVM_PRE_FAULT_MEMORY, &range) < 0)
            END(errno == EOPNOTSUPP || errno == ENOTTY ? EXIT_SKIP : EXIT_FAILURE,
                "KVM_PRE_FAULT_MEMORY: %s", strerror(errno));
}

/* From a slot of which nothing is mapped. */
static double seconds(int vcpu, const struct kvm_run *run, int ahead)
{
    struct kvm_regs regs = {.rip = CODE_PAGE * PAGE, .rflags = 2};
    double start;

    DO(ioctl(vcpu, KVM_SET_REGS, &regs));
    start = now();
    if (ahead)
        map_ahead(vcpu);
    DO(ioctl(vcpu, KVM_RUN, 0));
    EXPECT(run->exit_reason == KVM_EXIT_HLT);
    return now() - start;
}

void check_prefault_maps_ahead(void)
{
    int file = guest_memfd(PAGES * PAGE, 0), vcpu;
    unsigned char *memory = map_shared(file, PAGES * PAGE);
    double best[2] = {1e9, 1e9};
    struct kvm_run *run;

    memset(memory, 0, PAGES * PAGE);
    memcpy(memory + CODE_PAGE * PAGE, code, sizeof(code));
    vcpu = make_vcpu(&run);
    for (int round = 0; round < 2 * ROUNDS; round++) {
        double taken;

        set_slot(file, memory, PAGES * PAGE);
        taken = seconds(vcpu, run, round % 2);
        if (taken < best[round % 2])
            best[round % 2] = taken;
        set_slot(file, memory, 0);
    }
    printf("prefault_over_faults %.2f fault_us %.2f prefault_us %.2f\n", best[1] / best[0],
           best[0] * 1e6 / (double)TOUCHED, best[1] * 1e6 / (double)TOUCHED);
}
