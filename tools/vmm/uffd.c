#include "uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

#include "base.h"

/* KVM faults in kernel mode. The device's permissions allow that, or CAP_SYS_PTRACE the call. */
static int open_uffd(void)
{
    CLEANUP_CLOSE int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);

    if (device >= 0)
        return ioctl(device, USERFAULTFD_IOC_NEW, O_NONBLOCK | O_CLOEXEC);
    return (int)syscall(SYS_userfaultfd, O_NONBLOCK | O_CLOEXEC);
}

int uffd_create(void)
{
    struct uffdio_api api = {
        .api = UFFD_API,
        .features = UFFD_FEATURE_THREAD_ID | UFFD_FEATURE_EVENT_REMOVE,
    };
    int uffd = open_uffd();

    if (uffd < 0)
        fail(EX_UNAVAILABLE,
             "no userfaultfd: %s: let this user open /dev/userfaultfd, or give CAP_SYS_PTRACE",
             strerror(errno));
    if (ioctl(uffd, UFFDIO_API, &api) < 0)
        fail(EX_UNAVAILABLE, "this userfaultfd lacks THREAD_ID or EVENT_REMOVE: %s",
             strerror(errno));
    return uffd;
}
