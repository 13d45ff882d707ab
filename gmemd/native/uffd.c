/*
 * Some facts about userfaultfd that this file lives with.
 *
 * - A descriptor that blocks, or that has not had its API handshake, polls as POLLERR for ever; so both are seen to at once.
 * - An ioctl that resolves faults says two things: errno, and in its last field how far it got. A partial success is -1 with
 *   EAGAIN and a positive length; only a length of -EAGAIN means that an event (REMOVE, fork, mremap) waits to be read first.
 * - Every CONTINUE and COPY that fails wakes nobody. A page that somebody else has mapped in the meantime (EEXIST) may have a
 *   thread asleep on it whose message we hold, so EEXIST is always followed by WAKE.
 * - MINOR on shmem exists since Linux kernel commit c949b097ef2e ("userfaultfd/shmem: support minor fault registration
 *   for shmem") (in v5.14). There it fires for a page in the page cache only; an absent page of a range registered for
 *   MINOR alone is quietly allocated as zeros. MISSING as well is therefore asked for first.
 * - UNREGISTER wakes who waits where MISSING was registered. Where only MINOR was, it leaves them asleep for ever; and one that fails may have
 *   unregistered the first of several mappings. So WAKE follows, whatever it said.
 * - A thread of the VMM that takes pages out sleeps until its event has been read, whether the range is registered still or not. From
 *   before the event comes until that thread runs again, CONTINUE says EAGAIN before it looks at anything else.
 */
#include "uffd.h"

#include "cleanup.h"
#include "clock.h"
#include "uapi.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    LAST_MESSAGES = 16,
    LAST_EVENT_NS = 1000 * 1000, /* most threads come as far as their event, or back from it, within this */
};

static int open_descriptor(void)
{
    gm_auto_fd device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    int uffd = -1;

    if (device >= 0)
        uffd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0)
        uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    return uffd;
}

int gm_uffd_open(uint64_t features, struct gm_problem *ret)
{
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    gm_auto_fd uffd = open_descriptor();
    int made;

    if (uffd < 0)
        return gm_blame(ret, GM_KERNEL, errno, "userfaultfd: neither /dev/userfaultfd nor the system call");
    if (ioctl(uffd, UFFDIO_API, &api) < 0)
        return gm_blame(ret, GM_KERNEL, errno, "userfaultfd: features %#llx", (unsigned long long)features);
    made = uffd;
    uffd = -1;
    return made;
}

int gm_uffd_register(int uffd, uint64_t start, uint64_t length, struct gm_problem *ret)
{
    static const struct {
        uint64_t mode;
        int means;
    } modes[] = {
        {UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR, GM_UFFD_MISSING | GM_UFFD_MINOR},
        {UFFDIO_REGISTER_MODE_MINOR, GM_UFFD_MINOR},
    };
    int error = 0;

    for (unsigned i = 0; i < sizeof modes / sizeof modes[0]; i++) {
        struct uffdio_register r = {.range = {start, length}, .mode = modes[i].mode};

        if (ioctl(uffd, UFFDIO_REGISTER, &r) == 0) {
            if (r.ioctls & UINT64_C(1) << _UFFDIO_CONTINUE)
                return modes[i].means;
            return gm_blame(ret, GM_KERNEL, 0, "userfaultfd: the mapping at %#llx takes no UFFDIO_CONTINUE",
                            (unsigned long long)start);
        }
        error = errno;
        if (error != EINVAL)
            break;
    }
    return gm_blame(ret, error == EINVAL ? GM_KERNEL : GM_VMM, error,
                    "userfaultfd: cannot register %#llx bytes at %#llx for minor faults",
                    (unsigned long long)length, (unsigned long long)start);
}

int gm_uffd_unregister(int uffd, uint64_t start, uint64_t length)
{
    struct uffdio_range range = {start, length};
    int error = ioctl(uffd, UFFDIO_UNREGISTER, &range) < 0 ? -errno : 0;
    int asleep = gm_uffd_wake(uffd, start, length);

    return error ? error : asleep;
}

static void discard_messages(int uffd)
{
    struct uffd_msg messages[LAST_MESSAGES];
    int n;

    while ((n = gm_uffd_read(uffd, messages, LAST_MESSAGES)) > 0)
        for (int i = 0; i < n; i++)
            if (messages[i].event == UFFD_EVENT_FORK)
                close((int)messages[i].arg.fork.ufd);
}

int gm_uffd_drain(int uffd, uint64_t start, uint64_t length)
{
    uint64_t until = gm_now_ns() + LAST_EVENT_NS, done;

    for (;;) {
        discard_messages(uffd);
        if (gm_uffd_continue(uffd, start, length, length, &done) != -EAGAIN)
            return 0;
        if (gm_now_ns() > until)
            return -EAGAIN;
        sched_yield();
    }
}

int gm_uffd_wake(int uffd, uint64_t start, uint64_t length)
{
    struct uffdio_range range = {start, length};

    return ioctl(uffd, UFFDIO_WAKE, &range) < 0 ? -errno : 0;
}

int gm_uffd_copy(int uffd, uint64_t to, const void *from, uint64_t length)
{
    struct uffdio_copy copy = {.dst = to, .src = (uint64_t)(uintptr_t)from, .len = length};

    return ioctl(uffd, UFFDIO_COPY, &copy) < 0 ? -errno : 0;
}

int gm_uffd_zero(int uffd, uint64_t start, uint64_t length)
{
    struct uffdio_zeropage zero = {.range = {start, length}};

    return ioctl(uffd, UFFDIO_ZEROPAGE, &zero) < 0 ? -errno : 0;
}

int gm_uffd_continue(int uffd, uint64_t start, uint64_t length, uint64_t page_size, uint64_t *done)
{
    *done = 0;
    while (*done < length) {
        struct uffdio_continue c = {.range = {start + *done, length - *done}};

        if (ioctl(uffd, UFFDIO_CONTINUE, &c) == 0) {
            *done = length;
        } else if (c.mapped > 0) {
            *done += (uint64_t)c.mapped;
        } else if (errno == EEXIST) {
            int error = gm_uffd_wake(uffd, start + *done, page_size);

            if (error)
                return error;
            *done += page_size;
        } else if (errno != EINTR) {
            return -errno;
        }
    }
    return 0;
}

int gm_uffd_read(int uffd, void *messages, unsigned most)
{
    ssize_t got = read(uffd, messages, most * sizeof(struct uffd_msg));

    if (got < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -errno;
    return (int)((size_t)got / sizeof(struct uffd_msg));
}
