/* usage: checks NAME */
#include "checks.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

static const struct {
    const char *name;
    void (*run)(void);
} checks[] = {
#define CHECK(name) {#name, check_##name}
    CHECK(write_needs_the_flag),
    CHECK(write_takes_whole_pages),
    CHECK(write_is_what_the_mapping_shows),
    CHECK(write_beats_memcpy),
    CHECK(minor_stops_at_a_present_page),
    CHECK(missing_stops_at_an_absent_page),
    CHECK(minor_alone_stops_at_an_absent_page),
    CHECK(write_and_continue),
    CHECK(the_kernel_is_stopped_too),
    CHECK(an_alias_fills_in_peace),
    CHECK(continue_says_what_is_wrong),
    CHECK(no_direct_map_is_written_once),
    CHECK(no_direct_map_is_filled_by_the_mapping),
    CHECK(no_direct_map_cannot_be_pinned),
    CHECK(no_direct_map_begins_anew_after_a_punch),
    CHECK(userfault_wants_a_bitmap),
    CHECK(userfault_stops_a_vcpu),
    CHECK(prefault_maps_ahead),
};

int the_vm(void)
{
    static int vm = -1;

    if (vm < 0) {
        int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);

        if (kvm < 0)
            END(EXIT_SKIP, "/dev/kvm: %s", strerror(errno));
        DO(vm = ioctl(kvm, KVM_CREATE_VM, 0));
        close(kvm);
    }
    return vm;
}

int guest_memfd(size_t size, uint64_t more_flags)
{
    uint64_t flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED | more_flags;
    struct kvm_create_guest_memfd request = {.size = size, .flags = flags};
    int file = ioctl(the_vm(), KVM_CREATE_GUEST_MEMFD, &request);

    if (file < 0)
        END(EXIT_SKIP, "guest_memfd with flags %#jx: %s", (uintmax_t)flags, strerror(errno));
    return file;
}

int make_vcpu(struct kvm_run **run)
{
    struct kvm_sregs special;
    void *shared;
    int vcpu;

    DO(vcpu = ioctl(the_vm(), KVM_CREATE_VCPU, 0));
    shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    EXPECT(shared != MAP_FAILED);
    DO(ioctl(vcpu, KVM_GET_SREGS, &special));
    special.cs.base = 0;
    special.cs.selector = 0;
    DO(ioctl(vcpu, KVM_SET_SREGS, &special));
    *run = shared;
    return vcpu;
}

double now(void)
{
    struct timespec t;

    DO(clock_gettime(CLOCK_MONOTONIC, &t));
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

void *map_shared(int file, size_t size)
{
    void *address = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);

    if (address == MAP_FAILED)
        END(EXIT_FAILURE, "mmap: %s", strerror(errno));
    return address;
}

void write_pages(int file, uint64_t first, uint64_t count, unsigned char seed)
{
    unsigned char page[PAGE];

    for (uint64_t number = first; number < first + count; number++) {
        memset(page, (unsigned char)(number + seed), PAGE);
        EXPECT(pwrite(file, page, PAGE, (off_t)(number * PAGE)) == (ssize_t)PAGE);
    }
}

int main(int argc, char **argv)
{
    for (size_t i = 0; argc == 2 && i < sizeof(checks) / sizeof(*checks); i++) {
        if (strcmp(argv[1], checks[i].name) == 0) {
            checks[i].run();
            return EXIT_SUCCESS;
        }
    }
    END(EXIT_FAILURE, "no check of that name");
}
