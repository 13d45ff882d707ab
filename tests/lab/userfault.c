/* KVM userfault: a slot whose pages a vCPU may only touch once their bits are clear. */
#include "checks.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define PAGES ((size_t)16)
#define CODE_PAGE ((size_t)1)
#define DATA_PAGE ((size_t)3)
#define CONTENT 0x42

/* In real mode at DATA_PAGE's segment: mov al, [0]; hlt */
static const unsigned char code[] = {0xa0, 0x00, 0x00, 0xf4};

static int set_slot(int file, void *mapping, uint32_t flags, const void *bitmap)
{
    struct gmemd_kvm_memory_region2 slot = {
        .flags = KVM_MEM_GUEST_MEMFD | flags,
        .memory_size = PAGES * PAGE,
        .userspace_addr = (uint64_t)(uintptr_t)mapping,
        .guest_memfd = (uint32_t)file,
        .userfault_bitmap = (uint64_t)(uintptr_t)bitmap,
    };

    return ioctl(the_vm(), GMEMD_KVM_SET_USER_MEMORY_REGION2, &slot);
}

static void set_userfault_slot(int file, void *mapping, const void *bitmap)
{
    if (set_slot(file, mapping, (uint32_t)KVM_MEM_USERFAULT, bitmap) < 0)
        END(EXIT_SKIP, "a slot with KVM_MEM_USERFAULT: %s", strerror(errno));
}

void check_userfault_wants_a_bitmap(void)
{
    static _Alignas(8) const unsigned char bitmap[16];
    int file = guest_memfd(PAGES * PAGE, 0);
    void *mapping = map_shared(file, PAGES * PAGE);

    EXPECT_ERRNO(EINVAL, set_slot(file, mapping, (uint32_t)KVM_MEM_USERFAULT, NULL));
    EXPECT_ERRNO(EINVAL, set_slot(file, mapping, (uint32_t)KVM_MEM_USERFAULT, bitmap + 1));
    set_userfault_slot(file, mapping, bitmap);
}

void check_userfault_stops_a_vcpu(void)
{
    uint64_t bitmap = ~(UINT64_C(1) << CODE_PAGE);
    int file = guest_memfd(PAGES * PAGE, 0), vcpu;
    unsigned char *memory = map_shared(file, PAGES * PAGE);
    struct gmemd_kvm_memory_fault fault;
    struct kvm_regs start = {.rip = CODE_PAGE * PAGE, .rflags = 2}, regs;
    struct kvm_sregs special;
    struct kvm_run *run;

    set_userfault_slot(file, memory, &bitmap);
    vcpu = make_vcpu(&run);
    DO(ioctl(vcpu, KVM_GET_SREGS, &special));
    special.ds.base = DATA_PAGE * PAGE;
    special.ds.selector = (uint16_t)(DATA_PAGE * PAGE >> 4);
    DO(ioctl(vcpu, KVM_SET_SREGS, &special));
    DO(ioctl(vcpu, KVM_SET_REGS, &start));
    memcpy(memory + CODE_PAGE * PAGE, code, sizeof(code));

    EXPECT_ERRNO(EFAULT, ioctl(vcpu, KVM_RUN, 0));
    EXPECT(run->exit_reason == KVM_EXIT_MEMORY_FAULT);
    memcpy(&fault, &run->hw, sizeof(fault));
    EXPECT(fault.flags & KVM_MEMORY_EXIT_FLAG_USERFAULT);
    EXPECT(fault.gpa / PAGE == DATA_PAGE);

    memset(memory + DATA_PAGE * PAGE, CONTENT, PAGE);
    __atomic_fetch_and(&bitmap, ~(UINT64_C(1) << DATA_PAGE), __ATOMIC_RELEASE);
    DO(ioctl(vcpu, KVM_RUN, 0));
    EXPECT(run->exit_reason == KVM_EXIT_HLT);
    DO(ioctl(vcpu, KVM_GET_REGS, &regs));
    EXPECT((regs.rax & 0xff) == CONTENT);
}
