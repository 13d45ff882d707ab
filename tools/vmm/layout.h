/* The low area of guest memory: where its parts lie, and what the host puts there at first. */
#ifndef GMEMD_VMM_LAYOUT_H
#define GMEMD_VMM_LAYOUT_H

#include "guest.h"

/* Least memory that leaves data pages for 8 vCPUs beside the low area. */
enum { LAYOUT_LEAST_MEMORY = 1 << 20 };

/* Bits of x86-64 page table entries. */
enum {
    PTE_PRESENT = 1 << 0,
    PTE_WRITE = 1 << 1,
    PTE_USER = 1 << 2,
    PTE_ACCESSED = 1 << 5,
    PTE_DIRTY = 1 << 6,
    PTE_HUGE = 1 << 7,
};

struct guest_params layout_params(const struct guest_workload *workload, uint64_t memory_size,
                                  uint64_t vcpus);

/* Writes the low area as it is before the first instruction, into memory that is all zeros. */
void layout_build(const struct guest_params *params, uint8_t *low);

/* Page tables that map `size` bytes one to one: two pages, and one more for each GiB begun. */
void layout_tables(uint8_t *low, uint64_t tables, uint64_t size);

/* Where a vCPU enters the program, and the top of its stack. */
uint64_t layout_entry(const struct guest_params *params);
uint64_t layout_stack(const struct guest_params *params, uint64_t id);

#endif
