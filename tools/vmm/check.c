/*
 * Three comparisons. The low area with one that is built afresh, the ledger in it from the replay
 * of all steps. Every data page with the content that seed and replay say. And pages that did not
 * change since the switch, byte for byte, with the memory of the source.
 *
 * Some places of the low area are the guest's own, and nobody can know them: the upper end of a
 * stack, measurements. They are taken as they are; the rest of the same page tells whether the
 * page arrived.
 */
#include "check.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include "base.h"
#include "layout.h"
#include "model.h"
#include "workload.h"

/* The program's frame and the registers that it saves are some 200 bytes. */
enum { STACK_USED = 1024 };

struct checking {
    const struct machine *machine;
    const struct guest_params *params;
    uint32_t *at_switch; /* versions; NULL where there was no switch */
    uint32_t *now;
    uint8_t *wrong; /* one a page of all memory: it is counted already */
    struct check result;
};

static void mark_wrong(struct checking *checking, uint64_t address, uint64_t expected,
                       uint64_t found)
{
    uint8_t *wrong = &checking->wrong[address / GUEST_PAGE];

    if (checking->result.mismatches == 0) {
        checking->result.first_wrong.address = address;
        checking->result.first_wrong.expected = expected;
        checking->result.first_wrong.found = found;
    }
    checking->result.mismatches += !*wrong;
    *wrong = 1;
}

/* Compares a page at a guest physical address, and marks it if it is wrong. */
static bool compare_page(struct checking *checking, uint64_t address, const void *expected)
{
    const uint64_t *found = (const void *)(checking->machine->memory.base + address);
    const uint64_t *words = expected;

    if (memcmp(found, words, GUEST_PAGE) == 0)
        return true;
    for (uint64_t i = 0; i < GUEST_WORDS; i++) {
        if (found[i] != words[i]) {
            mark_wrong(checking, address + i * 8, words[i], found[i]);
            break;
        }
    }
    return false;
}

static void replay(struct checking *checking, const uint64_t *switched)
{
    const struct machine *machine = checking->machine;
    uint64_t start[GUEST_VCPUS] = {0}, end[GUEST_VCPUS];
    size_t size = checking->params->data_pages * sizeof(*checking->now);

    for (unsigned i = 0; i < machine->vcpus; i++)
        end[i] = machine_cpu(machine, i)->steps;
    checking->now = model_filled(checking->params);
    if (switched) {
        model_replay(checking->params, start, switched, checking->now);
        checking->at_switch = allocate(1, size);
        memcpy(checking->at_switch, checking->now, size);
    }
    model_replay(checking->params, switched ? switched : start, end, checking->now);
}

/*
 * The bits that a vCPU may have set: of shared pages, of pages that it wrote since the switch, and
 * of the one that it would have written next, had it not found a wrong byte there.
 */
static void keep_touched(const struct checking *checking, unsigned id, uint8_t *expected)
{
    const struct guest_params *params = checking->params;
    uint64_t start = params->touched + id * params->touched_size;
    uint64_t owned = workload_owned(params, id);
    uint64_t next = workload_choice(params, owned, id, machine_cpu(checking->machine, id)->steps);
    const uint64_t *found = (const void *)(checking->machine->memory.base + start);
    uint64_t *bits = (void *)(expected + start);

    for (uint64_t bit = 0; checking->at_switch && bit < params->shared_pages + owned; bit++) {
        uint64_t index = bit - params->shared_pages, page = workload_page(params, id, index);

        if (bit < params->shared_pages || index == next ||
            checking->now[page] != checking->at_switch[page])
            bits[bit / 64] |= found[bit / 64] & 1ull << bit % 64;
    }
}

static void keep(const struct checking *checking, uint8_t *expected, uint64_t address,
                 uint64_t size)
{
    memcpy(expected + address, checking->machine->memory.base + address, size);
}

static void keep_what_is_the_guests(const struct checking *checking, uint8_t *expected)
{
    const struct guest_params *params = checking->params;

    keep(checking, expected, GUEST_PARAMS + offsetof(struct guest_params, command),
         sizeof(*params) - offsetof(struct guest_params, command));
    for (unsigned id = 0; id < params->vcpus; id++) {
        keep(checking, expected, params->cpus + id * GUEST_PAGE, sizeof(struct guest_cpu));
        keep(checking, expected, params->stacks + (id + 1) * GUEST_PAGE - STACK_USED, STACK_USED);
        keep_touched(checking, id, expected);
    }
}

static void check_low(struct checking *checking)
{
    const struct guest_params *params = checking->params;
    CLEANUP_FREE uint8_t *expected = allocate(1, params->data);

    layout_build(params, expected);
    memcpy(expected + params->ledger, checking->now, params->data_pages * sizeof(*checking->now));
    keep_what_is_the_guests(checking, expected);
    for (uint64_t address = 0; address < params->data; address += GUEST_PAGE)
        checking->result.host_verified += compare_page(checking, address, expected + address);
}

static void check_data(struct checking *checking)
{
    const struct guest_params *params = checking->params;

    for (uint64_t page = 0; page < params->data_pages; page++) {
        uint64_t address = params->data + page * GUEST_PAGE, expected = 0, index;
        const uint64_t *words = (const void *)(checking->machine->memory.base + address);

        index = model_differs(params, page, checking->now[page], words, &expected);
        if (index < GUEST_WORDS)
            mark_wrong(checking, address + index * 8, expected, words[index]);
    }
}

/* A guest_memfd cannot be opened by its path in /proc; its descriptor can be taken, as any can. */
static int open_source_file(const char *path, uint64_t size)
{
    CLEANUP_CLOSE int process = -1;
    int pid, number, end = 0, file;
    struct stat status;

    if (sscanf(path, "/proc/%d/fd/%d%n", &pid, &number, &end) != 2 || path[end])
        fail(EX_USAGE, "verify: \"%s\" is not a path such as /proc/PID/fd/N", path);
    process = (int)syscall(SYS_pidfd_open, pid, 0);
    file = process < 0 ? -1 : (int)syscall(SYS_pidfd_getfd, process, number, 0);
    if (file < 0 || fstat(file, &status) < 0)
        fail(EX_NOINPUT, "verify: %s: %s", path, strerror(errno));
    if ((uint64_t)status.st_size < size)
        fail(EX_NOINPUT, "verify: %s has %lld bytes, the region needs %llu", path,
             (long long)status.st_size, (unsigned long long)size);
    return file;
}

static void check_region(struct checking *checking, const struct region *region, const char *path)
{
    const struct guest_params *params = checking->params;
    uint64_t end = region->gpa + region->size;
    uint64_t address = region->gpa > params->data ? region->gpa : params->data;
    CLEANUP_CLOSE int file = open_source_file(path, region->offset + region->size);
    uint8_t *source = mmap(NULL, region->size, PROT_READ, MAP_SHARED, file, (off_t)region->offset);

    if (source == MAP_FAILED)
        fail(EX_NOINPUT, "verify: mapping %s: %s", path, strerror(errno));
    for (; address < end; address += GUEST_PAGE) {
        uint64_t page = (address - params->data) / GUEST_PAGE;

        if (checking->at_switch[page] != checking->now[page])
            continue;
        compare_page(checking, address, source + (address - region->gpa));
        checking->result.against_source++;
    }
    munmap(source, region->size);
}

static void check_source(struct checking *checking, char *const *paths)
{
    const struct memory *memory = &checking->machine->memory;

    for (unsigned i = 0; i < memory->regions; i++)
        check_region(checking, &memory->region[i], paths[memory->region[i].file]);
}

struct check check_memory(const struct machine *machine, const uint64_t *switched,
                          char *const *paths, unsigned path_count)
{
    struct checking checking = {.machine = machine, .params = &machine->params};

    if (path_count && (!switched || path_count != machine->memory.files))
        fail(EX_USAGE, "verify: %u paths, the machine has %u memory files from a source",
             path_count, switched ? machine->memory.files : 0);
    checking.wrong = allocate(machine->params.pages, 1);
    replay(&checking, switched);
    check_low(&checking);
    check_data(&checking);
    if (path_count)
        check_source(&checking, paths);
    free(checking.wrong);
    free(checking.now);
    free(checking.at_switch);
    return checking.result;
}
