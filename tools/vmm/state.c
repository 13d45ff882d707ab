#include "state.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "base.h"

static const char MAGIC[8] = {'G', 'M', 'E', 'M', 'D', 'V', 'M', 'M'};

/* FNV-1a: a change of any one byte changes it. */
static uint64_t checksum(const void *bytes, size_t size)
{
    const unsigned char *byte = bytes;
    uint64_t sum = 0xcbf29ce484222325u;

    for (size_t i = 0; i < size; i++)
        sum = (sum ^ byte[i]) * 0x100000001b3u;
    return sum;
}

static uint64_t program_checksum(void)
{
    return checksum(__start_guest_code, (size_t)(__stop_guest_code - __start_guest_code));
}

static size_t state_size(uint64_t vcpus)
{
    return offsetof(struct state, vcpu) + vcpus * sizeof(struct vcpu_state);
}

int state_save(struct machine *machine)
{
    struct state state = {
        .version = STATE_VERSION,
        .guest = machine->guest,
        .size = state_size(machine->vcpus),
        .program = program_checksum(),
        .memory = machine->memory.size,
        .vcpus = machine->vcpus,
        .stopped_ns = machine_stopped_ns(machine),
        .workload = machine->params.workload,
    };
    int fd = memfd_create("vmm-state", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    memcpy(state.magic, MAGIC, sizeof(MAGIC));
    machine_save(machine, state.vcpu);
    state.checksum = checksum(&state, state.size);
    if (fd < 0 || write(fd, &state, state.size) != (ssize_t)state.size)
        fail(EX_OSERR, "writing the state into a memfd: %s", strerror(errno));
    if (fcntl(fd, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE) < 0)
        fail(EX_OSERR, "sealing the state: %s", strerror(errno));
    return fd;
}

static void check_shape(const struct state *state, uint64_t size)
{
    struct state copy = *state;

    if (size < state_size(0))
        fail(EX_PROTOCOL, "state: %llu bytes are too few: sent by the source",
             (unsigned long long)size);
    if (memcmp(state->magic, MAGIC, sizeof(MAGIC)) != 0)
        fail(EX_PROTOCOL, "state: it is not one of gmemd-vmm: sent by the source");
    if (state->version != STATE_VERSION)
        fail(EX_PROTOCOL, "state: version %u, this gmemd-vmm has %d: sent by the source",
             state->version, STATE_VERSION);
    if (state->vcpus < 1 || state->vcpus > GUEST_VCPUS || state->size != state_size(state->vcpus) ||
        state->size != size)
        fail(EX_PROTOCOL, "state: %llu bytes for %llu vCPUs, it says %llu: sent by the source",
             (unsigned long long)size, (unsigned long long)state->vcpus,
             (unsigned long long)state->size);
    copy.checksum = 0;
    if (checksum(&copy, state->size) != state->checksum)
        fail(EX_PROTOCOL, "state: the checksum is wrong, it was damaged on its way");
}

static void check_machine(const struct state *state, const struct machine *machine)
{
    const struct guest_workload *workload = &state->workload;

    if (state->memory != machine->memory.size)
        fail(EX_CONFIG, "the source's guest has %llu bytes of memory, --memory says %llu",
             (unsigned long long)state->memory, (unsigned long long)machine->memory.size);
    if (state->vcpus != machine->vcpus)
        fail(EX_CONFIG, "the source's guest has %llu vCPUs, --vcpus says %u",
             (unsigned long long)state->vcpus, machine->vcpus);
    if (state->guest != machine->guest)
        fail(EX_CONFIG, "the source's guest is one of %s, --guest says %s",
             state->guest == GUEST_KVM ? "kvm" : "threads", options_guest_name(machine->guest));
    if (state->program != program_checksum())
        fail(EX_CONFIG, "the source runs another build of gmemd-vmm, with another guest program");
    if (workload->pattern > GUEST_HOTSET || !workload->rate != !workload->pace)
        fail(EX_PROTOCOL, "state: there is no such workload: sent by the source");
}

struct state state_load(int fd, const struct machine *machine)
{
    struct state state = {0};
    struct stat file;

    if (fstat(fd, &file) < 0 || pread(fd, &state, sizeof(state), 0) < 0)
        fail(EX_PROTOCOL, "state: %s: sent by the daemon", strerror(errno));
    check_shape(&state, (uint64_t)file.st_size);
    check_machine(&state, machine);
    return state;
}
