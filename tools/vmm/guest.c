/*
 * The guest program. It is copied into guest memory and run by vCPUs in 64-bit mode, and the very
 * same function is run by threads where there is no KVM. So it must be one piece of position
 * independent code: all in one section, nothing of libc, no constants in memory, no vector
 * registers, no instrumentation. The pragmas ask for that.
 *
 * A vCPU may be stopped between any two instructions. The order inside a step (page, ledger,
 * counter) makes the step counter tell which pages are complete.
 */
#pragma GCC optimize("O2", "no-tree-loop-distribute-patterns", "no-tree-vectorize")
#pragma GCC optimize("no-jump-tables", "no-tree-switch-conversion", "no-stack-protector")
#pragma GCC target("general-regs-only")

#include "workload.h"

#define PROGRAM                                                                                    \
    __attribute__((section("guest_code"), no_sanitize("address", "undefined", "thread")))

/* Keeps the compiler from moving memory accesses across. */
#define BARRIER() __asm__ volatile("" ::: "memory")

struct place {
    uintptr_t base;
    uint64_t id;
    volatile struct guest_params *live; /* for what the host changes */
    const struct guest_params *params;
    struct guest_cpu *cpu;
    volatile uint32_t *ledger;
    uint64_t *touched;
    uint64_t *data;
    struct guest_thread *thread;
};

WORKLOAD void leave(const struct place *place, enum guest_exit reason)
{
    if (place->thread)
        place->thread->leave(place->thread, reason);
    else
        __asm__ volatile("outl %0, %1" ::"a"((uint32_t)reason), "d"((uint16_t)GUEST_PORT)
                         : "memory");
}

WORKLOAD uint64_t ticks(void)
{
    uint32_t low, high;

    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high)::"memory");
    return (uint64_t)high << 32 | low;
}

WORKLOAD uint64_t *page_words(const struct place *place, uint64_t page)
{
    return place->data + page * GUEST_WORDS;
}

WORKLOAD void write_page(const struct place *place, uint64_t page, uint32_t version)
{
    struct workload_content content = workload_content(place->params->workload.seed, page, version);
    uint64_t *words = page_words(place, page);

    for (uint64_t i = 0, word = content.first; i < GUEST_WORDS; i++, word += content.increment)
        words[i] = word;
    BARRIER();
    place->ledger[page] = version;
}

WORKLOAD bool check_page(const struct place *place, uint64_t page, uint32_t version)
{
    struct workload_content content = workload_content(place->params->workload.seed, page, version);
    const uint64_t *words = page_words(place, page);

    for (uint64_t i = 0, word = content.first; i < GUEST_WORDS; i++, word += content.increment) {
        if (words[i] == word)
            continue;
        place->cpu->wrong.page = page;
        place->cpu->wrong.version = version;
        place->cpu->wrong.address = (uintptr_t)&words[i] - place->base;
        place->cpu->wrong.expected = word;
        place->cpu->wrong.found = words[i];
        return false;
    }
    return true;
}

WORKLOAD uint64_t bucket(uint64_t value)
{
    uint64_t octave, index;

    if (value < GUEST_OCTAVE)
        return value;
    octave = 63 - (uint64_t)__builtin_clzll(value);
    index = (octave - 3) * GUEST_OCTAVE + ((value >> (octave - 4)) & (GUEST_OCTAVE - 1));
    return index < GUEST_BUCKETS ? index : GUEST_BUCKETS - 1;
}

/* Reads a page's version and its first word; times the first time since measuring began. */
WORKLOAD uint32_t touch(const struct place *place, uint64_t page, uint64_t bit)
{
    uint64_t *bits = &place->touched[bit / 64], mask = 1ull << bit % 64;
    bool first = place->live->measure && !(*bits & mask);
    uint64_t start = first ? ticks() : 0, ledger_read, took;
    uint32_t version = place->ledger[page];

    if (!first)
        return version;
    ledger_read = ticks();
    (void)*(volatile uint64_t *)page_words(place, page);
    took = ticks() - ledger_read;
    *bits |= mask;
    place->cpu->touches++;
    place->cpu->touch_sum += took;
    place->cpu->blocked += ledger_read - start + took;
    place->cpu->touch_histogram[bucket(took)]++;
    if (took > place->cpu->touch_max)
        place->cpu->touch_max = took;
    return version;
}

WORKLOAD bool step(const struct place *place, uint64_t owned, uint64_t number)
{
    uint64_t index = workload_choice(place->params, owned, place->id, number);
    uint64_t page = workload_page(place->params, place->id, index);
    uint32_t version = touch(place, page, place->params->shared_pages + index);
    const volatile struct guest_cpu *first;
    uint64_t shared;

    if (!check_page(place, page, version))
        return false;
    write_page(place, page, version + 1);
    *(volatile uint64_t *)&place->cpu->steps = number + 1;

    /* All vCPUs follow the first one's counter, so that they come to one shared page at once. */
    first = (const volatile struct guest_cpu *)(place->base + place->params->cpus);
    shared = workload_below(workload_mix(first->steps), place->params->shared_pages);
    return check_page(place, shared, touch(place, shared, shared));
}

WORKLOAD void fill(const struct place *place, uint64_t owned)
{
    const struct guest_params *params = place->params;

    for (uint64_t page = place->id; page < params->shared_pages; page += params->vcpus)
        if (!workload_is_hole(params, page))
            write_page(place, page, 1);
    for (uint64_t index = 0; index < owned; index++) {
        uint64_t page = workload_page(params, place->id, index);

        if (!workload_is_hole(params, page))
            write_page(place, page, 1);
    }
}

WORKLOAD bool verify_page(const struct place *place, uint64_t page)
{
    bool right = check_page(place, page, place->ledger[page]);

    place->cpu->verified += right;
    return right;
}

WORKLOAD bool verify(const struct place *place, uint64_t owned)
{
    const struct guest_params *params = place->params;

    for (uint64_t page = place->id; page < params->shared_pages; page += params->vcpus)
        if (!verify_page(place, page))
            return false;
    for (uint64_t index = 0; index < owned; index++)
        if (!verify_page(place, workload_page(params, place->id, index)))
            return false;
    return true;
}

/* Steps until the host wants the final check (true); or a byte is wrong, or a thread is to stop. */
WORKLOAD bool work(const struct place *place, uint64_t owned, uint64_t number, bool *ret_stopped)
{
    uint64_t command, pace = place->params->workload.pace;

    for (;;) {
        struct guest_thread *thread = place->thread;

        if (thread && __atomic_load_n(&thread->stop, __ATOMIC_RELAXED)) {
            thread->step = number;
            *ret_stopped = true;
            return false;
        }
        command = place->live->command;
        if (command == GUEST_VERIFY)
            return true;
        if (command == GUEST_STOP) {
            leave(place, GUEST_STOPPED);
            continue;
        }
        if (!step(place, owned, number))
            return false;
        number++;
        if (pace && number % pace == 0)
            leave(place, GUEST_PACE);
    }
}

PROGRAM void guest_program(uintptr_t base, uint64_t id, struct guest_thread *thread)
{
    const struct guest_params *params = (const struct guest_params *)(base + GUEST_PARAMS);
    const struct place place = {
        .base = base,
        .id = id,
        .live = (volatile struct guest_params *)(base + GUEST_PARAMS),
        .params = params,
        .cpu = (struct guest_cpu *)(base + params->cpus + id * GUEST_PAGE),
        .ledger = (volatile uint32_t *)(base + params->ledger),
        .touched = (uint64_t *)(base + params->touched + id * params->touched_size),
        .data = (uint64_t *)(base + params->data),
        .thread = thread,
    };
    uint64_t owned = workload_owned(params, id);
    bool stopped = false;

    if (!thread || !thread->filled) {
        fill(&place, owned);
        if (thread)
            thread->filled = true;
        leave(&place, GUEST_FILLED);
    }
    if (work(&place, owned, thread ? thread->step : 0, &stopped) && verify(&place, owned))
        leave(&place, GUEST_VERIFIED);
    else if (!stopped)
        leave(&place, GUEST_WRONG);
    while (!thread)
        leave(&place, GUEST_STOPPED);
}
