/*
 * The floor: what a page over the network costs when nothing is left out that could be. A process whose threads touch
 * memory and a thread that reads their faults, and a process with the content. 8 bytes go out, 4096 come back, no
 * framing, no checks of content, no claims, no bitmap.
 */
#include <errno.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include "../vmm/base.h"
#include "../vmm/uffd.h"
#include "loopback.h"
#include "pattern.h"
#include "touch.h"

struct handler {
    const struct memory *memory;
    int uffd, sock;
    bool sleep, stop;
    uint32_t asked[TOUCH_THREADS]; /* a ring: answers come in the order of the requests */
    uint64_t since_ns[TOUCH_THREADS];
    unsigned first, count;
    size_t have;
    struct samples handled; /* from the message read to the thread continued */
    uint8_t content[TOUCH_THREADS * PATTERN_PAGE];
};

static void wait_for_either(const struct handler *h)
{
    struct pollfd polled[] = {{.fd = h->uffd, .events = POLLIN}, {.fd = h->sock, .events = POLLIN}};

    if (poll(polled, 2, -1) < 0)
        fail(EX_OSERR, "poll: %s", strerror(errno));
}

static void take_faults(struct handler *h)
{
    struct uffd_msg message[TOUCH_THREADS];
    uint64_t page[TOUCH_THREADS];
    ssize_t got = read(h->uffd, message, sizeof(message));
    size_t count = got > 0 ? (size_t)got / sizeof(message[0]) : 0;
    uint64_t now;

    if (!count)
        return;
    now = now_ns();
    for (size_t i = 0; i < count; i++) {
        unsigned at = (h->first + h->count++) % TOUCH_THREADS;

        page[i] = (message[i].arg.pagefault.address - (uintptr_t)h->memory->base) / PATTERN_PAGE;
        h->asked[at] = (uint32_t)page[i];
        h->since_ns[at] = now;
    }
    loopback_send(h->sock, page, count * sizeof(page[0]));
}

static void install(struct handler *h, const uint8_t *content)
{
    unsigned at = h->first++ % TOUCH_THREADS;
    off_t offset = (off_t)h->asked[at] * PATTERN_PAGE;
    struct uffdio_continue go = {
        .range = {.start = (uintptr_t)h->memory->base + (uintptr_t)offset, .len = PATTERN_PAGE}};

    h->count--;
    if (pwrite(h->memory->file[0], content, PATTERN_PAGE, offset) != PATTERN_PAGE)
        fail(EX_OSERR, "pwrite of page %u: %s", h->asked[at], strerror(errno));
    if (ioctl(h->uffd, UFFDIO_CONTINUE, &go) < 0)
        fail(EX_OSERR, "UFFDIO_CONTINUE of page %u: %s", h->asked[at], strerror(errno));
    samples_add(&h->handled, now_ns() - h->since_ns[at]);
}

static void take_pages(struct handler *h)
{
    ssize_t got = recv(h->sock, h->content + h->have, sizeof(h->content) - h->have, MSG_DONTWAIT);
    size_t whole;

    if (got <= 0)
        return;
    h->have += (size_t)got;
    whole = h->have / PATTERN_PAGE * PATTERN_PAGE;
    for (size_t at = 0; at < whole; at += PATTERN_PAGE)
        install(h, h->content + at);
    memmove(h->content, h->content + whole, h->have - whole);
    h->have -= whole;
}

static void *handle(void *argument)
{
    struct handler *h = argument;

    while (!__atomic_load_n(&h->stop, __ATOMIC_ACQUIRE)) {
        if (h->sleep)
            wait_for_either(h);
        take_faults(h);
        if (h->count)
            take_pages(h);
    }
    return NULL;
}

/* The other process: requests in, pages out. */
static void answer(int sock, const uint8_t *content, bool sleeps)
{
    uint64_t page[TOUCH_THREADS];
    size_t have = 0, count;
    ssize_t got;

    for (;;) {
        got = recv(sock, (char *)page + have, sizeof(page) - have, sleeps ? 0 : MSG_DONTWAIT);
        if (got == 0)
            return;
        if (got < 0)
            continue;
        have += (size_t)got;
        count = have / sizeof(page[0]);
        for (size_t i = 0; i < count; i++)
            loopback_send(sock, content + page[i] * PATTERN_PAGE, PATTERN_PAGE);
        have -= count * sizeof(page[0]);
        memmove(page, page + count, have);
    }
}

static void register_memory(int uffd, const struct memory *memory)
{
    struct uffdio_register all = {
        .range = {.start = (uintptr_t)memory->base, .len = memory->size},
        .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR,
    };

    if (ioctl(uffd, UFFDIO_REGISTER, &all) < 0)
        fail(EX_UNAVAILABLE, "registering %llu bytes: %s", (unsigned long long)memory->size,
             strerror(errno));
}

int main(int argc, char **argv)
{
    struct arguments a = arguments_parse(argc, argv);
    struct memory memory = memory_create(&a.machine, -1);
    const uint8_t *content = loopback_map(a.source, memory.size);
    static struct handler handler;
    static struct touch touch;
    pthread_t thread;
    struct json json;
    int ends[2];

    loopback_pair(ends);
    if (loopback_fork() == 0) {
        close(ends[0]);
        answer(ends[1], content, a.sleep);
        _exit(0);
    }
    handler = (struct handler){.memory = &memory, .uffd = uffd_create(), .sock = ends[0], .sleep = a.sleep};
    handler.handled = samples_create(a.touches);
    register_memory(handler.uffd, &memory);
    touch_create(&touch, &a, &memory);
    if (pthread_create(&thread, NULL, handle, &handler))
        fail(EX_OSERR, "no thread for the handler");
    touch_begin(&touch);
    touch_join(&touch, false);
    __atomic_store_n(&handler.stop, true, __ATOMIC_RELEASE);
    shutdown(handler.sock, SHUT_RDWR); /* wakes a handler that sleeps */
    pthread_join(thread, NULL);

    json_begin(&json);
    json_string(&json, "event", "floor");
    json_bool(&json, "sleeps", a.sleep);
    touch_report(&touch, &json);
    samples_report(&handler.handled, &json, "handled_us");
    json_print(&json);
    return 0;
}
