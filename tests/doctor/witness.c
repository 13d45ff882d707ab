/*
 * usage: witness FD PAGE-SIZE
 *
 * What userfaultfd does on a memory file of one page, told independently of gmemd: by a thread that
 * loads a byte in user space. Prints a line for each of gmemd's checks of the same name: what the
 * fault was, or what was read.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef UFFDIO_REGISTER_MODE_MINOR
#error "these headers are older than MINOR"
#endif
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

#define CONTENT 7
#define PATIENCE 10 /* seconds */

static char *range, *alias, *source;
static size_t page;
static int done[2];

static void *load(void *unused)
{
    char seen = *(volatile char *)range;

    (void)unused;
    if (write(done[1], &seen, 1) != 1)
        err(71, "write");
    return NULL;
}

static int new_uffd(void)
{
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    int uffd = device < 0 ? -1 : ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {.api = UFFD_API};

    if (uffd < 0)
        uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
        err(71, "userfaultfd");
    if (device >= 0)
        close(device);
    return uffd;
}

/* Gives the waiting thread its page. */
static void answer(int uffd, uint64_t mode)
{
    struct uffdio_continue go_on = {.range = {(uintptr_t)range, page}};
    struct uffdio_copy copy = {.dst = (uintptr_t)range, .src = (uintptr_t)source, .len = page};

    if (mode == UFFDIO_REGISTER_MODE_MISSING) {
        if (ioctl(uffd, UFFDIO_COPY, &copy))
            err(1, "UFFDIO_COPY");
        return;
    }
    memset(alias, CONTENT, page);
    if (ioctl(uffd, UFFDIO_CONTINUE, &go_on))
        err(1, "UFFDIO_CONTINUE");
}

static void expect_content(const char *name)
{
    char seen = 0;

    if (read(done[0], &seen, 1) != 1 || seen != CONTENT)
        errx(1, "%s: the content did not come through", name);
}

static void try(const char *name, uint64_t mode, int file, int present)
{
    struct uffdio_range where = {(uintptr_t)range, page};
    struct uffdio_register request = {.range = where, .mode = mode};
    int uffd = new_uffd();
    struct pollfd both[] = {{uffd, POLLIN, 0}, {done[0], POLLIN, 0}};
    struct uffd_msg message;
    pthread_t thread;
    char seen;
    int minor;

    if (fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)page))
        err(71, "fallocate");
    if (present)
        memset(alias, CONTENT, page);
    if (ioctl(uffd, UFFDIO_REGISTER, &request)) {
        printf("%s refused\n", name);
        close(uffd);
        return;
    }
    if (pthread_create(&thread, NULL, load, NULL) || poll(both, 2, PATIENCE * 1000) < 1)
        errx(71, "%s: neither a fault nor an end", name);
    if (both[0].revents & POLLIN) {
        if (read(uffd, &message, sizeof message) != sizeof message)
            err(71, "read");
        minor = (message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR) != 0;
        printf("%s %s\n", name, minor ? "minor" : "missing");
        answer(uffd, mode);
        expect_content(name);
    } else {
        if (read(done[0], &seen, 1) != 1)
            err(71, "read");
        printf("%s %s\n", name, seen == CONTENT ? "content" : seen == 0 ? "zero" : "other");
    }
    pthread_join(thread, NULL);
    close(uffd);
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 64;
    int file = atoi(argv[1]);

    alarm(3 * PATIENCE);
    page = (size_t)atoi(argv[2]);
    source = malloc(page);
    if (!source)
        err(71, "malloc");
    memset(source, CONTENT, page);
    range = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    alias = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (range == MAP_FAILED || alias == MAP_FAILED || pipe(done))
        err(71, "mmap, pipe");
    try("minor", UFFDIO_REGISTER_MODE_MINOR, file, 1);
    try("absent_in_minor", UFFDIO_REGISTER_MODE_MINOR, file, 0);
    try("missing", UFFDIO_REGISTER_MODE_MISSING, file, 0);
    return 0;
}
