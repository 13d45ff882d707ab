#include "layout.h"

#include <string.h>

#include "base.h"

/* Page tables: a top page, a page of 1 GiB entries, and a page of 2 MiB entries for each GiB. */
enum { TABLE_ENTRIES = 512, STACK_FILL = 0x5a };

static const uint64_t HUGE_PAGE = 2u << 20, TABLE_SPAN = 1u << 30;

static uint64_t pages_for(uint64_t bytes)
{
    return (bytes + GUEST_PAGE - 1) / GUEST_PAGE;
}

/* One part behind the other; each starts on a page of its own. */
static uint64_t place_part(uint64_t *at, uint64_t pages)
{
    uint64_t start = *at;

    *at += pages * GUEST_PAGE;
    return start;
}

struct guest_params layout_params(const struct guest_workload *workload, uint64_t memory_size,
                                  uint64_t vcpus)
{
    uint64_t pages = memory_size / GUEST_PAGE, at = GUEST_PARAMS + GUEST_PAGE;
    uint64_t program = (uint64_t)(__stop_guest_code - __start_guest_code);
    uint64_t tables = 2 + (memory_size + TABLE_SPAN - 1) / TABLE_SPAN;
    struct guest_params params = {.workload = *workload, .pages = pages, .vcpus = vcpus};

    /* A bit for each page that a vCPU owns or shares: sized as if all pages were data pages. */
    params.touched_size = pages_for((pages / vcpus + pages / 32 + 64) / 8) * GUEST_PAGE;
    params.cpus = place_part(&at, vcpus);
    params.stacks = place_part(&at, vcpus);
    params.program = place_part(&at, pages_for(program));
    params.tables = place_part(&at, tables);
    params.ledger = place_part(&at, pages_for(pages * sizeof(uint32_t)));
    params.touched = place_part(&at, vcpus * params.touched_size / GUEST_PAGE);
    params.data = at;
    params.data_pages = pages - at / GUEST_PAGE;
    params.shared_pages = params.data_pages / 32;
    return params;
}

/* Accessed and dirty are set from the start, so that the CPU has nothing to write here. */
void layout_tables(uint8_t *low, uint64_t tables, uint64_t size)
{
    const uint64_t pointer = PTE_PRESENT | PTE_WRITE | PTE_USER | PTE_ACCESSED;
    const uint64_t leaf = pointer | PTE_DIRTY | PTE_HUGE;
    uint64_t *top = (uint64_t *)(void *)(low + tables);
    uint64_t *second = top + TABLE_ENTRIES, *third = second + TABLE_ENTRIES;

    top[0] = (tables + GUEST_PAGE) | pointer;
    for (uint64_t i = 0; i * TABLE_SPAN < size; i++)
        second[i] = (tables + (2 + i) * GUEST_PAGE) | pointer;
    for (uint64_t i = 0; i * HUGE_PAGE < size; i++)
        third[i] = (i * HUGE_PAGE) | leaf;
}

void layout_build(const struct guest_params *params, uint8_t *low)
{
    memcpy(low + GUEST_PARAMS, params, sizeof(*params));
    memset(low + params->stacks, STACK_FILL, params->vcpus * GUEST_PAGE);
    memcpy(low + params->program, __start_guest_code,
           (size_t)(__stop_guest_code - __start_guest_code));
    layout_tables(low, params->tables, params->pages * GUEST_PAGE);
}

uint64_t layout_entry(const struct guest_params *params)
{
    return params->program + ((uintptr_t)guest_program - (uintptr_t)__start_guest_code);
}

uint64_t layout_stack(const struct guest_params *params, uint64_t id)
{
    return params->stacks + (id + 1) * GUEST_PAGE - 8; /* as after a call: 8 off a multiple of 16 */
}
