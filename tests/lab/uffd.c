/* userfaultfd on guest_memfd. */
#include "checks.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define PAGES ((size_t)4)
#define BOTH (UFFDIO_REGISTER_MODE_MINOR | UFFDIO_REGISTER_MODE_MISSING)
#define PATIENCE_MS 20000 /* an emulated machine on a busy host */

/* A file mapped twice, and the userfaultfd that the one mapping is registered with. */
struct trap {
    int file;
    int uffd;
    unsigned char *range;
    unsigned char *alias;
};

/* A thread that looks at one byte. */
struct toucher {
    pthread_t thread;
    unsigned char *at;
    int into; /* a pipe that the kernel is to write the byte to, or -1: the thread reads it itself */
    unsigned char seen;
};

static struct trap set_trap(uint64_t modes, uint64_t file_flags)
{
    struct trap trap = {.file = guest_memfd(PAGES * PAGE, file_flags)};
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register request = {.mode = modes};
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);

    if (device < 0)
        END(EXIT_SKIP, "/dev/userfaultfd: %s", strerror(errno));
    DO(trap.uffd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK));
    close(device);
    DO(ioctl(trap.uffd, UFFDIO_API, &api));
    trap.range = map_shared(trap.file, PAGES * PAGE);
    trap.alias = map_shared(trap.file, PAGES * PAGE);
    request.range = (struct uffdio_range){(uint64_t)(uintptr_t)trap.range, PAGES * PAGE};
    if (ioctl(trap.uffd, UFFDIO_REGISTER, &request) < 0)
        END(EXIT_SKIP, "UFFDIO_REGISTER of guest_memfd, modes %ju: %s", (uintmax_t)modes, strerror(errno));
    return trap;
}

static void *touch(void *argument)
{
    struct toucher *toucher = argument;

    if (toucher->into < 0)
        toucher->seen = *(volatile unsigned char *)toucher->at;
    else
        EXPECT(write(toucher->into, toucher->at, 1) == 1);
    return NULL;
}

static void start(struct toucher *toucher, unsigned char *at, int into)
{
    *toucher = (struct toucher){.at = at, .into = into};
    EXPECT(pthread_create(&toucher->thread, NULL, touch, toucher) == 0);
}

static unsigned char end(struct toucher *toucher)
{
    EXPECT(pthread_join(toucher->thread, NULL) == 0);
    return toucher->seen;
}

/* Waits for the fault on the page, and expects it to be of the kind. */
static void expect_fault(const struct trap *trap, size_t page, int minor)
{
    struct pollfd ready = {.fd = trap->uffd, .events = POLLIN};
    struct uffd_msg message;

    EXPECT(poll(&ready, 1, PATIENCE_MS) == 1);
    EXPECT(read(trap->uffd, &message, sizeof(message)) == (ssize_t)sizeof(message));
    EXPECT(message.event == UFFD_EVENT_PAGEFAULT);
    EXPECT(message.arg.pagefault.address == (uint64_t)(uintptr_t)(trap->range + page * PAGE));
    EXPECT(!!(message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR) == minor);
}

static int proceed(const struct trap *trap, size_t first, size_t count)
{
    uint64_t start_of = (uint64_t)(uintptr_t)(trap->range + first * PAGE);
    struct uffdio_continue request = {.range = {start_of, count * PAGE}};

    return ioctl(trap->uffd, UFFDIO_CONTINUE, &request);
}

static void fill(const struct trap *trap, size_t page, unsigned char with)
{
    memset(trap->alias + page * PAGE, with, PAGE);
}

static void expect_demand_paging(uint64_t modes, int present, int minor)
{
    struct trap trap = set_trap(modes, 0);
    struct toucher toucher;

    if (present)
        fill(&trap, 2, 40);
    start(&toucher, trap.range + 2 * PAGE + 99, -1);
    expect_fault(&trap, 2, minor);
    fill(&trap, 2, 50);
    DO(proceed(&trap, 2, 1));
    EXPECT(end(&toucher) == 50);
}

void check_minor_stops_at_a_present_page(void)
{
    expect_demand_paging(BOTH, 1, 1);
}

void check_missing_stops_at_an_absent_page(void)
{
    expect_demand_paging(BOTH, 0, 0);
}

void check_minor_alone_stops_at_an_absent_page(void)
{
    expect_demand_paging(UFFDIO_REGISTER_MODE_MINOR, 0, 1);
}

void check_write_and_continue(void)
{
    struct trap trap = set_trap(BOTH, GUEST_MEMFD_FLAG_WRITE);
    struct toucher toucher;

    start(&toucher, trap.range + 2 * PAGE, -1);
    expect_fault(&trap, 2, 0);
    write_pages(trap.file, 2, 1, 50);
    DO(proceed(&trap, 2, 1));
    EXPECT(end(&toucher) == 52);
}

/* As KVM does when it looks up a page for a vCPU. */
void check_the_kernel_is_stopped_too(void)
{
    struct trap trap = set_trap(BOTH, 0);
    struct toucher toucher;
    unsigned char seen = 0;
    int ends[2];

    DO(pipe2(ends, O_CLOEXEC));
    start(&toucher, trap.range + PAGE, ends[1]);
    expect_fault(&trap, 1, 0);
    fill(&trap, 1, 60);
    DO(proceed(&trap, 1, 1));
    end(&toucher);
    EXPECT(read(ends[0], &seen, 1) == 1 && seen == 60);
}

/* Half of the page has come, and nobody sees it. */
void check_an_alias_fills_in_peace(void)
{
    struct trap trap = set_trap(BOTH, 0);
    struct toucher toucher;

    memset(trap.alias, 1, PAGE / 2);
    start(&toucher, trap.range + PAGE - 1, -1);
    expect_fault(&trap, 0, 1);
    memset(trap.alias + PAGE / 2, 2, PAGE / 2);
    DO(proceed(&trap, 0, 1));
    EXPECT(end(&toucher) == 2);
}

void check_continue_says_what_is_wrong(void)
{
    struct trap trap = set_trap(BOTH, 0);

    EXPECT_ERRNO(EFAULT, proceed(&trap, 0, 1));
    for (unsigned char page = 0; page < PAGES; page++)
        fill(&trap, page, page);
    DO(proceed(&trap, 1, 2));
    EXPECT_ERRNO(EEXIST, proceed(&trap, 1, 1));
    DO(proceed(&trap, 0, 1));
    EXPECT(trap.range[0] == 0 && trap.range[PAGE] == 1 && trap.range[2 * PAGE] == 2);
}
