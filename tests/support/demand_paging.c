/*
 * Demand paging, measured as the kernel's own demand_paging_test does: each vCPU reads a word of every page of
 * its share of memory, one after the other, and nothing else. The program and its page tables are in a slot that
 * never faults. `--gmemd -`: a thread of this process handles the faults, with content that it has at hand.
 */
#include <errno.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "../../tools/vmm/base.h"
#include "../../tools/vmm/handoff.h"
#include "../../tools/vmm/json.h"
#include "../../tools/vmm/layout.h"
#include "../../tools/vmm/machine.h"
#include "../../tools/vmm/uffd.h"

enum { MESSAGES = 64 };

static const uint64_t HUGE_PAGE = 2u << 20;

extern const char program_begin[], program_end[];

/* Adds up the first words of the pages from rsi to rdi in rbx. */
__asm__(".section .rodata\n"
        "program_begin: add (%rsi), %rbx\n"
        "add $4096, %rsi\n"
        "cmp %rdi, %rsi\n"
        "jb program_begin\n"
        "out %eax, %dx\n"
        "program_end:\n"
        ".text\n");

static struct machine machine;
static struct message message;
static pthread_barrier_t begin;

/* The page tables map all memory and this slot behind it, each address to itself. */
static uint64_t create_program_slot(void)
{
    uint64_t gpa = (machine.memory.size + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1);
    const uint64_t pointer = PTE_PRESENT | PTE_WRITE | PTE_USER | PTE_ACCESSED;
    uint8_t *slot = mmap(NULL, HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct kvm_userspace_memory_region region = {
        .slot = OPTIONS_REGIONS,
        .guest_phys_addr = gpa,
        .memory_size = HUGE_PAGE,
        .userspace_addr = (uintptr_t)slot,
    };
    uint64_t *tables = (uint64_t *)(void *)(slot + GUEST_PAGE);

    if (slot == MAP_FAILED || gpa + HUGE_PAGE > 1u << 30)
        fail(EX_OSERR, "no memory for the program, or more than 1 GiB in all");
    memcpy(slot, program_begin, (size_t)(program_end - program_begin));
    tables[0] = (gpa + 2 * GUEST_PAGE) | pointer;
    tables[512] = (gpa + 3 * GUEST_PAGE) | pointer;
    for (uint64_t i = 0; i * HUGE_PAGE <= gpa; i++)
        tables[1024 + i] = (i * HUGE_PAGE) | pointer | PTE_DIRTY | PTE_HUGE;
    if (ioctl(machine.vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
        fail(EX_UNAVAILABLE, "the program's slot: %s", strerror(errno));
    machine.params.tables = gpa + GUEST_PAGE;
    return gpa;
}

static void create_machine(const struct options *options)
{
    uint64_t program, share = options->memory / options->vcpus;

    machine.vcpus = options->vcpus;
    kvm_create_vm(&machine);
    machine.memory = memory_create(options, machine.vm);
    slots_create(&machine, options);
    program = create_program_slot();
    for (unsigned i = 0; i < machine.vcpus; i++) {
        struct vcpu *vcpu = &machine.vcpu[i];
        struct kvm_regs regs = {
            .rip = program, .rsi = i * share, .rdi = (i + 1) * share, .rflags = 0x3002, .rdx = GUEST_PORT};

        vcpu->machine = &machine;
        vcpu->id = i;
        kvm_create_vcpu(vcpu);
        kvm_reset_vcpu(vcpu, program, 0, machine.params.tables);
        if (ioctl(vcpu->fd, KVM_SET_REGS, &regs) < 0)
            fail(EX_SOFTWARE, "KVM_SET_REGS: %s", strerror(errno));
    }
}

static void *run_vcpu(void *argument)
{
    struct vcpu *vcpu = argument;
    struct kvm_regs regs;

    pthread_barrier_wait(&begin);
    vcpu->started_ns = now_ns();
    if (ioctl(vcpu->fd, KVM_RUN, 0) < 0 || vcpu->run->exit_reason != KVM_EXIT_IO)
        fail(EX_SOFTWARE, "vCPU %u left the guest for %u", vcpu->id, vcpu->run->exit_reason);
    vcpu->stopped_ns = now_ns();
    ioctl(vcpu->fd, KVM_GET_REGS, &regs);
    vcpu->pace_ns = regs.rbx; /* what it added up */
    return NULL;
}

/* The content of a source that tests/support/recovery.py fills. */
static uint64_t first_word(uint64_t page)
{
    return (page + 1) << 32 | 1;
}

static void handle(int uffd, uint8_t *alias, const uint8_t *content, uint64_t address)
{
    uint64_t at = (address - (uintptr_t)machine.memory.base) & ~(uint64_t)(GUEST_PAGE - 1);
    struct uffdio_continue resolve = {.range = {(uintptr_t)machine.memory.base + at, GUEST_PAGE}};

    memcpy(alias + at, content + at, GUEST_PAGE);
    if (ioctl(uffd, UFFDIO_CONTINUE, &resolve) < 0 && errno != EEXIST)
        fail(EX_OSERR, "UFFDIO_CONTINUE: %s", strerror(errno));
}

static void *handler_main(void *argument)
{
    int uffd = *(int *)argument;
    uint64_t size = machine.memory.size;
    uint8_t *alias = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, machine.memory.file[0], 0);
    uint8_t *content = allocate(1, size);
    struct pollfd polled = {.fd = uffd, .events = POLLIN};
    struct uffd_msg messages[MESSAGES];

    for (uint64_t page = 0; page < size / GUEST_PAGE; page++)
        *(uint64_t *)(void *)(content + page * GUEST_PAGE) = first_word(page);
    pthread_barrier_wait(&begin);
    for (;;) {
        ssize_t size_read;

        poll(&polled, 1, -1);
        size_read = read(uffd, messages, sizeof(messages));
        for (ssize_t i = 0; i < size_read / (ssize_t)sizeof(messages[0]); i++)
            handle(uffd, alias, content, messages[i].arg.pagefault.address);
    }
    return NULL;
}

static void handle_here(int *uffd)
{
    struct uffdio_register all = {
        .range = {(uintptr_t)machine.memory.base, machine.memory.size},
        .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR,
    };
    pthread_t thread;

    if (ioctl(*uffd, UFFDIO_REGISTER, &all) < 0)
        fail(EX_UNAVAILABLE, "registering memory with userfaultfd: %s", strerror(errno));
    if (pthread_create(&thread, NULL, handler_main, uffd) != 0)
        fail(EX_OSERR, "no thread for the handler");
}

static void expect(int daemon, const char *member)
{
    const char *wrong = handoff_receive(daemon, &message);

    if (wrong || !json_get_true(message.text, member))
        fail(EX_PROTOCOL, "gmemd, instead of \"%s\": %s", member, wrong ? wrong : message.text);
    message_close(&message);
}

static int hand_over(const struct options *options, int uffd)
{
    unsigned index = machine.memory.files;
    int daemon = handoff_connect(options->gmemd), fds[HANDOFF_FDS];
    struct json json;

    memcpy(fds, machine.memory.file, index * sizeof(int));
    fds[index] = uffd;
    json_begin(&json);
    json_number(&json, "gmemd", 1);
    json_string(&json, "receive", options->migration);
    handoff_regions(&json, &machine.memory, &index);
    if (!handoff_send(daemon, json_end(&json), fds, index + 1))
        fail(EX_PROTOCOL, "gmemd closed the connection");
    expect(daemon, "ready");
    return daemon;
}

static void report(void)
{
    uint64_t pages = machine.memory.size / GUEST_PAGE, begun = UINT64_MAX, ended = 0, sum = 0;
    double seconds;
    struct json json;

    for (unsigned i = 0; i < machine.vcpus; i++) {
        const struct vcpu *vcpu = &machine.vcpu[i];

        begun = vcpu->started_ns < begun ? vcpu->started_ns : begun;
        ended = vcpu->stopped_ns > ended ? vcpu->stopped_ns : ended;
        sum += vcpu->pace_ns;
    }
    for (uint64_t page = 0; page < pages; page++)
        sum -= first_word(page);
    if (sum)
        fail(EX_DATAERR, "the vCPUs read something else than there was to read");
    seconds = (double)(ended - begun) / 1e9;
    json_begin(&json);
    json_number(&json, "pages", pages);
    json_fraction(&json, "pages_per_s_vcpu", (double)pages / seconds / machine.vcpus);
    json_print(&json);
}

int main(int argc, char **argv)
{
    struct options options = options_parse(argc, argv);
    bool here = options.destination && strcmp(options.gmemd, "-") == 0;
    int uffd = uffd_create(), daemon = -1;

    create_machine(&options);
    pthread_barrier_init(&begin, NULL, machine.vcpus + here);
    if (here)
        handle_here(&uffd);
    else
        daemon = hand_over(&options, uffd);
    for (unsigned i = 0; i < machine.vcpus; i++)
        if (pthread_create(&machine.vcpu[i].thread, NULL, run_vcpu, &machine.vcpu[i]) != 0)
            fail(EX_OSERR, "no thread for vCPU %u", i);
    for (unsigned i = 0; i < machine.vcpus; i++)
        pthread_join(machine.vcpu[i].thread, NULL);
    if (!here)
        expect(daemon, "done");
    report();
    return EX_OK;
}
