/*
 * The thread that runs into the faults that a probe wants to see.
 *
 * Whether a fault is trapped shows only in a thread that touches the page, and a thread whose fault
 * nobody answers waits for ever. So the toucher is one that can always be let go: unregistering and
 * closing the userfaultfd ends every wait on it. It touches the page by send(), in the kernel:
 *
 * - KVM's faults are the kernel's. A userfaultfd that is UFFD_USER_MODE_ONLY does not trap those,
 *   and send() says so with EFAULT.
 * - A page that is poisoned, or that has no memory behind it, ends in EFAULT and not in SIGBUS.
 * - A UNIX socket holds no lock while it copies from user memory, so the other end can be polled
 *   meanwhile. A pipe holds one, and even closing it would wait for the fault.
 *
 * A signal would end the wait with EFAULT, too, so the toucher takes none.
 */
#include "probe_toucher.h"

#include "cleanup.h"
#include "uapi.h"

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

/* A trap shows within microseconds, in an emulated machine on a busy host within milliseconds. */
static const struct timespec patience = {.tv_sec = 3};

static void *touch(void *argument)
{
    struct gm_toucher *toucher = argument;
    const struct gm_arena *arena = toucher->arena;
    long result;

    atomic_store(&toucher->tid, (int)syscall(SYS_gettid));
    if (toucher->deed == GM_DEED_REMOVE)
        result = madvise(arena->range, arena->page, MADV_REMOVE);
    else
        result = send(toucher->far, arena->range, sizeof(uint64_t), MSG_NOSIGNAL);
    if (result < 0)
        atomic_store(&toucher->error, errno);
    shutdown(toucher->far, SHUT_WR);
    return NULL;
}

struct gm_trial gm_toucher_start(struct gm_toucher *toucher, struct gm_arena *arena,
                                 enum gm_deed deed)
{
    sigset_t all, before;
    int ends[2];
    int error;

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0)
        return gm_trial_untried("socketpair", errno);
    toucher->near = ends[0];
    toucher->far = ends[1];
    toucher->arena = arena;
    toucher->deed = deed;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(&toucher->thread, NULL, touch, toucher);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error)
        return gm_trial_untried("pthread_create", error);
    toucher->runs = true;
    return gm_trial_yes(0);
}

void gm_toucher_stop(struct gm_toucher *toucher)
{
    if (toucher->runs) {
        gm_arena_drop_uffd(toucher->arena);
        pthread_join(toucher->thread, NULL);
    }
    gm_close_fd(&toucher->near);
    gm_close_fd(&toucher->far);
}

static int what_was_read(const struct gm_toucher *toucher)
{
    uint64_t word;
    ssize_t got = recv(toucher->near, &word, sizeof word, MSG_DONTWAIT);

    if (got != sizeof word)
        return GM_PROBE_SEEN_REFUSED;
    if (word == GM_PROBE_FILL_WORD)
        return GM_PROBE_SEEN_CONTENT;
    return word == 0 ? GM_PROBE_SEEN_ZERO : GM_PROBE_SEEN_OTHER;
}

static int what_was_trapped(const struct uffd_msg *message)
{
    if (message->event != UFFD_EVENT_PAGEFAULT)
        return GM_PROBE_SEEN_OTHER;
    return message->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR ? GM_PROBE_SEEN_MINOR
                                                                    : GM_PROBE_SEEN_MISSING;
}

int gm_toucher_await(const struct gm_toucher *toucher, struct uffd_msg *message)
{
    struct pollfd both[] = {{toucher->arena->uffd, POLLIN, 0}, {toucher->near, POLLIN, 0}};
    sigset_t all;

    sigfillset(&all);
    if (ppoll(both, 2, &patience, &all) <= 0)
        return GM_PROBE_SEEN_NOTHING;
    if (both[0].revents & POLLIN &&
        read(toucher->arena->uffd, message, sizeof *message) == sizeof *message)
        return what_was_trapped(message);
    return both[1].revents ? what_was_read(toucher) : GM_PROBE_SEEN_NOTHING;
}
