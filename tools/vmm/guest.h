/*
 * What the guest program and the host share: how guest memory is laid out, and how a guest leaves
 * its program.
 *
 * Guest memory, from guest physical address 0, in pages of 4 KiB:
 *
 *   a page that nobody uses · parameters · a page a vCPU (struct guest_cpu) · a stack page a vCPU ·
 *   the program · page tables · ledger (u32 a data page: its version) · touched (per vCPU, a bit a
 *   page) · data pages
 *
 * Everything before the data pages is the low area. The first data pages are shared: every vCPU
 * reads them, nobody writes. Of the others each belongs to one vCPU.
 */
#ifndef GMEMD_VMM_GUEST_H
#define GMEMD_VMM_GUEST_H

#include <stdbool.h>
#include <stdint.h>

enum {
    GUEST_PAGE = 4096,
    GUEST_WORDS = GUEST_PAGE / 8,
    GUEST_VCPUS = 8,
    GUEST_PARAMS = GUEST_PAGE, /* the one address that is fixed */
    GUEST_PORT = 0x510,        /* `out` to it is how the program speaks to the host */
};

enum guest_pattern { GUEST_SEQUENTIAL, GUEST_RANDOM, GUEST_STRIDED, GUEST_HOTSET };

/* Why the guest left its program. */
enum guest_exit { GUEST_FILLED = 1, GUEST_PACE, GUEST_WRONG, GUEST_STOPPED, GUEST_VERIFIED };

enum guest_command { GUEST_WORK, GUEST_STOP, GUEST_VERIFY };

struct guest_workload {
    uint64_t seed;
    uint64_t pattern;    /* enum guest_pattern */
    uint64_t stride;     /* strided: in pages of the vCPU */
    uint64_t hot_share;  /* hotset: per cent of a vCPU's pages that nine steps of ten choose */
    uint64_t zero_share; /* per cent of the data pages that are left as holes */
    uint64_t rate;       /* steps a second and vCPU at most; 0: no limit */
    uint64_t pace;       /* steps between two GUEST_PACE; 0: never */
};

struct guest_params {
    struct guest_workload workload;
    uint64_t pages; /* of all guest memory */
    uint64_t vcpus;
    /* Where each part starts, in bytes; and the size of touched for one vCPU. */
    uint64_t cpus, stacks, program, tables, ledger, touched, data, touched_size;
    uint64_t data_pages;
    uint64_t shared_pages;
    /* The host writes these two while the guest runs. */
    uint64_t command; /* enum guest_command */
    uint64_t measure; /* whether first touches are timed */
};

/*
 * A histogram with 16 buckets an octave (values apart by 6 % share one), good up to 2^40 ticks:
 * minutes.
 */
enum { GUEST_OCTAVE = 16, GUEST_BUCKETS = (40 - 4 + 1) * GUEST_OCTAVE };

struct guest_cpu {
    uint64_t steps;    /* done and complete */
    uint64_t verified; /* data pages found right by the final check */
    struct {
        uint64_t page, version, address, expected, found;
    } wrong;
    /* From here on measurements, in ticks of the time stamp counter. */
    uint64_t touches;
    uint64_t touch_sum;
    uint64_t touch_max;
    uint64_t blocked; /* touch_sum, and waits for the ledger */
    uint32_t touch_histogram[GUEST_BUCKETS];
};

_Static_assert(sizeof(struct guest_cpu) <= GUEST_PAGE, "a vCPU's area is one page");
_Static_assert(sizeof(struct guest_params) <= GUEST_PAGE, "the parameters are one page");

/* Where a thread stands in for a vCPU: what a vCPU would have in registers, and its way out. */
struct guest_thread {
    bool filled;
    uint64_t step;
    int stop; /* set by the host, atomically: leave before the next step */
    void (*leave)(struct guest_thread *thread, enum guest_exit reason);
};

/*
 * The program. A vCPU enters with base 0 and no thread, and never returns; a thread passes the
 * address where guest memory is mapped, and returns when it was stopped or is at its end.
 */
void guest_program(uintptr_t base, uint64_t id, struct guest_thread *thread);

/* The section that the program is in. */
extern const char __start_guest_code[], __stop_guest_code[];

#endif
