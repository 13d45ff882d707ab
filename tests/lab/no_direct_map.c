/* guest_memfd whose pages leave the kernel's direct map when they get their content. */
#include "checks.h"

#include <fcntl.h>
#include <sys/uio.h>

#define FLAGS (GUEST_MEMFD_FLAG_WRITE | GUEST_MEMFD_FLAG_NO_DIRECT_MAP)

void check_no_direct_map_is_written_once(void)
{
    static const unsigned char page[4096];
    int file = guest_memfd(2 * PAGE, FLAGS);
    const unsigned char *seen = map_shared(file, 2 * PAGE);

    write_pages(file, 0, 1, 5);
    EXPECT_ERRNO(EEXIST, pwrite(file, page, PAGE, 0));
    EXPECT(seen[0] == 5 && seen[PAGE - 1] == 5);
    write_pages(file, 1, 1, 5);
    EXPECT(seen[PAGE] == 6);
}

void check_no_direct_map_is_filled_by_the_mapping(void)
{
    static const unsigned char page[4096];
    int file = guest_memfd(PAGE, FLAGS);
    unsigned char *mapping = map_shared(file, PAGE);

    memset(mapping, 3, PAGE);
    EXPECT_ERRNO(EEXIST, pwrite(file, page, PAGE, 0));
    EXPECT(mapping[0] == 3 && mapping[PAGE - 1] == 3);
    memset(mapping, 4, PAGE);
    EXPECT(mapping[0] == 4 && mapping[PAGE - 1] == 4);
}

/* process_vm_readv pins what it reads, as O_DIRECT and MSG_ZEROCOPY do. */
void check_no_direct_map_cannot_be_pinned(void)
{
    unsigned char copy[4096];
    int file = guest_memfd(PAGE, FLAGS);
    struct iovec to = {copy, PAGE}, from = {map_shared(file, PAGE), PAGE};

    write_pages(file, 0, 1, 5);
    EXPECT_ERRNO(EFAULT, process_vm_readv(getpid(), &to, 1, &from, 1, 0));
    EXPECT(((unsigned char *)from.iov_base)[0] == 5);
    from.iov_base = map_shared(guest_memfd(PAGE, GUEST_MEMFD_FLAG_WRITE), PAGE);
    EXPECT(process_vm_readv(getpid(), &to, 1, &from, 1, 0) == (ssize_t)PAGE);
}

void check_no_direct_map_begins_anew_after_a_punch(void)
{
    int file = guest_memfd(PAGE, FLAGS);
    const unsigned char *seen = map_shared(file, PAGE);

    write_pages(file, 0, 1, 5);
    DO(fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)PAGE));
    write_pages(file, 0, 1, 9);
    EXPECT(seen[0] == 9 && seen[PAGE - 1] == 9);
}
