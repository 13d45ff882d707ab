/*
 * A mapped memory file raises SIGBUS when it is touched beyond its end, or when no page can be had for it. Its owner may cause
 * either at any time, and must not take the daemon down with it. So the kernel does the copy and answers EFAULT:
 * process_vm_readv() and process_vm_writev() on ourselves treat the side called local as a user buffer, and pin the pages of the
 * side called remote. The mapping is always the local side, since pages out of the direct map cannot be pinned.
 */
#include "guard.h"

#include <errno.h>
#include <stdbool.h>
#include <sys/uio.h>
#include <unistd.h>

static int copy(char *mapping, char *buffer, size_t length, bool store)
{
    pid_t self = getpid();

    while (length) {
        struct iovec local = {mapping, length};
        struct iovec remote = {buffer, length};
        ssize_t got = store ? process_vm_readv(self, &local, 1, &remote, 1, 0)
                            : process_vm_writev(self, &local, 1, &remote, 1, 0);

        if (got < 0)
            return -errno;
        if (got == 0)
            return -EFAULT;
        mapping += got;
        buffer += got;
        length -= (size_t)got;
    }
    return 0;
}

int gm_guarded_store(void *mapping, const void *from, size_t length)
{
    return copy(mapping, (char *)(size_t)from, length, true);
}

int gm_guarded_load(void *to, const void *mapping, size_t length)
{
    return copy((char *)(size_t)mapping, to, length, false);
}
