/*
 * Region sizes are odd on purpose, and neighbouring regions of one kind share a file, so that
 * offsets and sizes are seldom what a careless reader would guess. Huge regions come first: then
 * they stay aligned to their page size both in guest physical and in host virtual addresses, while
 * all regions together are one piece in both.
 */
#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>

#include "base.h"
#include "uapi.h"

static const uint64_t HUGE_PAGE = 2u << 20;

/* Splits `size` into `count` regions of odd numbers of pages; the last takes what is left. */
static void split(struct memory *memory, unsigned first, unsigned count, uint64_t size,
                  enum backing backing)
{
    uint64_t page_size = backing == BACKING_HUGETLB ? HUGE_PAGE : GUEST_PAGE;
    uint64_t pages = size / page_size, each = (pages / count - 1) | 1;

    if (pages < count)
        fail(EX_USAGE, "--regions: %llu pages of %llu bytes do not make %u regions",
             (unsigned long long)pages, (unsigned long long)page_size, count);
    for (unsigned i = 0; i < count; i++, pages -= each) {
        uint64_t region_pages = i + 1 < count ? each : pages;

        memory->region[first + i] = (struct region){
            .backing = backing,
            .size = region_pages * page_size,
            .page_size = page_size,
        };
    }
}

static void plan_regions(struct memory *memory, const struct options *options)
{
    uint64_t huge = options->memory / 2 / HUGE_PAGE * HUGE_PAGE, gpa = 0;
    unsigned huge_regions = options->regions / 2;

    memory->regions = options->regions;
    if (options->backing == BACKING_MIXED) {
        split(memory, 0, huge_regions, huge, BACKING_HUGETLB);
        split(memory, huge_regions, options->regions - huge_regions, options->memory - huge,
              BACKING_MEMFD);
    } else {
        split(memory, 0, options->regions, options->memory, options->backing);
    }
    for (unsigned i = 0; i < memory->regions; i++) {
        memory->region[i].gpa = gpa;
        gpa += memory->region[i].size;
    }
}

/* Two neighbours of one kind to a file. */
static void plan_files(struct memory *memory)
{
    for (unsigned i = 0; i < memory->regions; i++) {
        struct region *region = &memory->region[i];

        if (i % 2 == 1 && region[-1].backing == region->backing) {
            region->file = region[-1].file;
            region->offset = region[-1].size;
        } else {
            region->file = memory->files++;
        }
    }
}

static void set_size(int file, uint64_t size)
{
    if (ftruncate(file, (off_t)size) < 0)
        fail(EX_OSERR, "a memory file of %llu bytes: %s", (unsigned long long)size,
             strerror(errno));
}

/* A size that is sealed spares the daemon the fear of SIGBUS. */
static int create_memfd(uint64_t size, bool huge)
{
    unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING | (huge ? MFD_HUGETLB | MFD_HUGE_2MB : 0);
    int file = memfd_create("guest-memory", flags);

    if (file < 0)
        fail(EX_UNAVAILABLE, "memfd_create of %s memory: %s", huge ? "2 MiB hugetlb" : "plain",
             strerror(errno));
    set_size(file, size);
    if (fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
        fail(EX_OSERR, "sealing the size of a memory file: %s", strerror(errno));
    return file;
}

/* On a filesystem of its own, mounted nowhere, which ends with the file. Its mount option decides about folios, not the host. */
static int create_tmpfs_file(uint64_t size)
{
    CLEANUP_CLOSE int context = fsopen("tmpfs", FSOPEN_CLOEXEC);
    CLEANUP_CLOSE int mount = -1;
    int file;

    if (context >= 0 && fsconfig(context, FSCONFIG_SET_STRING, "huge", "within_size", 0) == 0 &&
        fsconfig(context, FSCONFIG_SET_STRING, "size", "0", 0) == 0 && /* no limit */
        fsconfig(context, FSCONFIG_CMD_CREATE, NULL, NULL, 0) == 0)
        mount = fsmount(context, FSMOUNT_CLOEXEC, 0);
    if (mount < 0)
        fail(EX_UNAVAILABLE, "a tmpfs with huge=within_size: %s: it takes root, and a kernel with "
             "transparent huge pages; or use --backing memfd", strerror(errno));
    file = openat(mount, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, S_IRUSR | S_IWUSR);
    if (file < 0)
        fail(EX_OSERR, "a file on a tmpfs: %s", strerror(errno));
    set_size(file, size);
    return file;
}

static int create_guest_memfd(const struct options *options, uint64_t size, int vm)
{
    struct kvm_create_guest_memfd create = {.size = size};
    int offered, file;

    if (vm < 0)
        fail(EX_UNAVAILABLE, "guest_memfd is made by KVM: use --guest kvm where /dev/kvm opens");
    offered = ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_GUEST_MEMFD_FLAGS);
    create.flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED;
    if (offered > 0)
        create.flags |= (uint64_t)offered & GUEST_MEMFD_FLAG_WRITE;
    if (options->no_direct_map)
        create.flags |= GUEST_MEMFD_FLAG_NO_DIRECT_MAP;
    if (options->no_direct_map && offered >= 0 && !(offered & (int)GUEST_MEMFD_FLAG_NO_DIRECT_MAP))
        fail(EX_UNAVAILABLE,
             "guest_memfd: this KVM offers flags %d, NO_DIRECT_MAP (4) is not among them: run a "
             "kernel that has it (`make lab-kernel` builds one), or leave --no-direct-map away",
             offered);
    file = ioctl(vm, KVM_CREATE_GUEST_MEMFD, &create);
    if (file < 0)
        fail(EX_UNAVAILABLE,
             "guest_memfd: %s: this KVM offers flags %d, MMAP and INIT_SHARED (3) are needed: "
             "run Linux 6.18 or later with CONFIG_KVM_GUEST_MEMFD, or use --backing memfd",
             strerror(errno), offered > 0 ? offered : 0);
    return file;
}

static int create_file(const struct options *options, enum backing backing, uint64_t size, int vm)
{
    if (backing == BACKING_GUEST_MEMFD)
        return create_guest_memfd(options, size, vm);
    if (backing == BACKING_TMPFS)
        return create_tmpfs_file(size);
    return create_memfd(size, backing == BACKING_HUGETLB);
}

static void create_files(struct memory *memory, const struct options *options, int vm)
{
    uint64_t sizes[OPTIONS_REGIONS] = {0};

    for (unsigned i = 0; i < memory->regions; i++)
        sizes[memory->region[i].file] += memory->region[i].size;
    for (unsigned i = 0; i < memory->regions; i++) {
        const struct region *region = &memory->region[i];

        if (region->offset)
            continue;
        memory->file[region->file] =
            create_file(options, region->backing, sizes[region->file], vm);
    }
}

static uint8_t *reserve(uint64_t size)
{
    void *mapping = mmap(NULL, size + HUGE_PAGE, PROT_NONE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (mapping == MAP_FAILED)
        fail(EX_OSERR, "reserving %llu bytes of addresses: %s", (unsigned long long)size,
             strerror(errno));
    return (uint8_t *)(((uintptr_t)mapping + HUGE_PAGE - 1) & ~(uintptr_t)(HUGE_PAGE - 1));
}

static void map(const struct memory *memory, const struct region *region)
{
    uint8_t *address = memory->base + region->gpa;
    void *mapping = mmap(address, region->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                         memory->file[region->file], (off_t)region->offset);

    if (mapping == MAP_FAILED && region->backing == BACKING_HUGETLB && errno == ENOMEM)
        fail(EX_UNAVAILABLE,
             "%llu huge pages of 2 MiB are not to be had: raise vm.nr_hugepages (sysctl)",
             (unsigned long long)(region->size / HUGE_PAGE));
    if (mapping == MAP_FAILED)
        fail(EX_OSERR, "mapping %llu bytes of guest memory: %s", (unsigned long long)region->size,
             strerror(errno));
    if (madvise(address, region->size, MADV_DONTDUMP) < 0)
        fail(EX_OSERR, "keeping guest memory out of core dumps: %s", strerror(errno));
}

struct memory memory_create(const struct options *options, int vm)
{
    struct memory memory = {.size = options->memory};

    plan_regions(&memory, options);
    plan_files(&memory);
    create_files(&memory, options, vm);
    memory.base = reserve(memory.size);
    for (unsigned i = 0; i < memory.regions; i++)
        map(&memory, &memory.region[i]);
    return memory;
}
