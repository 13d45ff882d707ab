/*
 * What KVM takes the guest's memory from. A plain slot is the mapping: a missing page stops whoever
 * touches it in the userfaultfd. A guest_memfd slot is the file itself, past the mapping, and a
 * missing page makes the vCPU leave KVM_RUN, if the slot has a bitmap that says so.
 */
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#include "base.h"
#include "machine.h"
#include "uapi.h"

static void create_plain(const struct machine *machine, unsigned index)
{
    const struct region *region = &machine->memory.region[index];
    struct kvm_userspace_memory_region slot = {
        .slot = index,
        .guest_phys_addr = region->gpa,
        .memory_size = region->size,
        .userspace_addr = (uintptr_t)machine->memory.base + region->gpa,
    };

    if (ioctl(machine->vm, KVM_SET_USER_MEMORY_REGION, &slot) < 0)
        fail(EX_UNAVAILABLE, "region %u as a slot of KVM: %s", index, strerror(errno));
}

static void create_guest_memfd(const struct machine *machine, unsigned index)
{
    const struct memory *memory = &machine->memory;
    const struct region *region = &memory->region[index];
    struct userfault_slot slot = {
        .slot = index,
        .flags = KVM_MEM_GUEST_MEMFD,
        .guest_phys_addr = region->gpa,
        .memory_size = region->size,
        .userspace_addr = (uintptr_t)memory->base + region->gpa,
        .guest_memfd = (__u32)memory->file[region->file],
        .guest_memfd_offset = region->offset,
    };

    if (memory->bitmaps) {
        slot.flags |= KVM_MEM_USERFAULT;
        slot.userfault_bitmap = (uintptr_t)memory->bitmaps + region->bitmap_offset;
    }
    if (ioctl(machine->vm, SET_USERFAULT_SLOT, &slot) < 0)
        fail(EX_UNAVAILABLE, "region %u as a guest_memfd slot%s: %s: use --slot plain%s", index,
             memory->bitmaps ? " with KVM userfault" : "", strerror(errno),
             memory->bitmaps ? ", or a kernel that has it (`make lab-kernel` builds one)" : "");
}

void slots_create(const struct machine *machine, const struct options *options)
{
    for (unsigned i = 0; i < machine->memory.regions; i++) {
        if (options->slot == SLOT_GUEST_MEMFD)
            create_guest_memfd(machine, i);
        else
            create_plain(machine, i);
    }
}
