/* userfaultfd, tried out on one page. */
#include "probe.h"

#include "cleanup.h"
#include "probe_arena.h"
#include "probe_toucher.h"
#include "uapi.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static int open_by(int way, const char **step)
{
    int flags = O_CLOEXEC | O_NONBLOCK;

    if (way == GM_PROBE_DEVICE) {
        *step = "open /dev/userfaultfd";
        gm_auto_fd device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);

        if (device < 0)
            return -1;
        *step = "USERFAULTFD_IOC_NEW";
        return ioctl(device, USERFAULTFD_IOC_NEW, flags);
    }
    *step = "userfaultfd";
    return (int)syscall(SYS_userfaultfd,
                        way == GM_PROBE_USER_MODE_ONLY ? flags | UFFD_USER_MODE_ONLY : flags);
}

struct gm_trial gm_probe_uffd_open(int way)
{
    const char *step;
    gm_auto_fd uffd = open_by(way, &step);

    return gm_trial_call(uffd, step);
}

static struct gm_trial use_uffd(struct gm_arena *arena, uint64_t features)
{
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    const char *step;

    for (int way = GM_PROBE_DEVICE; arena->uffd < 0 && way <= GM_PROBE_USER_MODE_ONLY; way++)
        arena->uffd = open_by(way, &step);
    if (arena->uffd < 0)
        return gm_trial_untried("userfaultfd", errno);
    if (ioctl(arena->uffd, UFFDIO_API, &api) < 0)
        return gm_trial_no("UFFDIO_API", errno);
    return gm_trial_yes((long long)api.features);
}

struct gm_trial gm_probe_uffd_features(void)
{
    gm_auto_arena arena = GM_NO_ARENA;

    return use_uffd(&arena, 0);
}

void gm_arena_drop_uffd(struct gm_arena *arena)
{
    struct uffdio_range range = {(uint64_t)(uintptr_t)arena->range, arena->page};
    struct uffd_msg unread;

    if (arena->uffd < 0)
        return;
    /* A fork may have taken a copy along, so that closing ours is not enough to wake who waits. */
    (void)ioctl(arena->uffd, UFFDIO_UNREGISTER, &range);
    while (read(arena->uffd, &unread, sizeof unread) > 0)
        ;
    gm_close_fd(&arena->uffd);
    arena->uffd = -1;
}

/* What most trials begin with: the page, registered. */
static struct gm_trial set_up(struct gm_arena *arena, int backing, int modes, uint64_t features)
{
    struct uffdio_register request = {.mode = (__u64)modes};
    struct gm_trial trial = use_uffd(arena, features);

    if (trial.ok == 1)
        trial = gm_arena_open(arena, backing);
    if (trial.ok != 1)
        return trial;
    request.range = (struct uffdio_range){(uint64_t)(uintptr_t)arena->range, arena->page};
    return gm_trial_call(ioctl(arena->uffd, UFFDIO_REGISTER, &request), "UFFDIO_REGISTER");
}

/* What came of it */

static bool is_trap(int seen)
{
    return seen == GM_PROBE_SEEN_MINOR || seen == GM_PROBE_SEEN_MISSING;
}

static struct gm_trial with_value(struct gm_trial trial, int seen)
{
    trial.value = seen;
    return trial;
}

/* The trial's answer when the toucher ended up with `seen` in place of what had to come. */
static struct gm_trial not_this(const struct gm_toucher *toucher, int seen, const char *step)
{
    int error = seen == GM_PROBE_SEEN_NOTHING ? ETIMEDOUT : atomic_load(&toucher->error);

    return with_value(gm_trial_no(step, error), seen);
}

/* Resolving */

static const struct {
    const char *name;
    int seen; /* what the page reads as afterwards */
} ways[] = {
    [GM_PROBE_CONTINUE] = {"UFFDIO_CONTINUE", GM_PROBE_SEEN_CONTENT},
    [GM_PROBE_COPY] = {"UFFDIO_COPY", GM_PROBE_SEEN_CONTENT},
    [GM_PROBE_ZEROPAGE] = {"UFFDIO_ZEROPAGE", GM_PROBE_SEEN_ZERO},
    [GM_PROBE_MOVE] = {"UFFDIO_MOVE", GM_PROBE_SEEN_CONTENT},
    [GM_PROBE_POISON] = {"UFFDIO_POISON", GM_PROBE_SEEN_REFUSED},
};

static long resolve(const struct gm_arena *arena, int how)
{
    uint64_t to = (uint64_t)(uintptr_t)arena->range;
    uint64_t from = (uint64_t)(uintptr_t)arena->content;
    struct uffdio_range range = {to, arena->page};
    struct uffdio_continue minor = {.range = range};
    struct uffdio_copy copy = {.dst = to, .src = from, .len = arena->page};
    struct uffdio_zeropage zero = {.range = range};
    struct uffdio_move move = {.dst = to, .src = from, .len = arena->page};
    struct uffdio_poison poison = {.range = range};

    switch (how) {
    case GM_PROBE_CONTINUE:
        return ioctl(arena->uffd, UFFDIO_CONTINUE, &minor);
    case GM_PROBE_COPY:
        return ioctl(arena->uffd, UFFDIO_COPY, &copy);
    case GM_PROBE_ZEROPAGE:
        return ioctl(arena->uffd, UFFDIO_ZEROPAGE, &zero);
    case GM_PROBE_MOVE:
        return ioctl(arena->uffd, UFFDIO_MOVE, &move);
    default:
        return ioctl(arena->uffd, UFFDIO_POISON, &poison);
    }
}

struct gm_trial gm_probe_resolve(int backing, int how)
{
    gm_auto_arena arena = GM_NO_ARENA;
    gm_auto_toucher toucher = GM_NO_TOUCHER;
    struct uffd_msg message;
    int error, seen;
    struct gm_trial trial =
        set_up(&arena, backing, how == GM_PROBE_CONTINUE ? GM_PROBE_MINOR : GM_PROBE_MISSING, 0);

    if (trial.ok != 1)
        return trial;
    if (arena.no_memory && how != GM_PROBE_POISON)
        return gm_trial_no_page(&arena, arena.no_memory);
    error = how == GM_PROBE_CONTINUE ? gm_arena_fill(&arena) : 0;
    if (error)
        return gm_trial_no_page(&arena, error);
    if (resolve(&arena, how) < 0)
        return gm_trial_no(ways[how].name, errno);
    trial = gm_toucher_start(&toucher, &arena, GM_DEED_READ);
    if (trial.ok != 1)
        return trial;
    seen = gm_toucher_await(&toucher, &message);
    return seen == ways[how].seen ? gm_trial_yes(seen) : not_this(&toucher, seen, ways[how].name);
}

/* Trapping */

/* Puts the content there and lets the trapped toucher go on; the answer keeps what the trap was. */
static struct gm_trial release(const struct gm_toucher *toucher, int how, bool present, int trapped)
{
    const struct gm_arena *arena = toucher->arena;
    struct uffd_msg message;
    int error = arena->no_memory;
    int seen;

    if (how == GM_PROBE_CONTINUE && !present)
        error = gm_arena_fill(arena);
    if (error)
        return with_value(gm_trial_no_page(arena, error), trapped);
    if (resolve(arena, how) < 0)
        return with_value(gm_trial_no(ways[how].name, errno), trapped);
    seen = gm_toucher_await(toucher, &message);
    if (seen != GM_PROBE_SEEN_CONTENT)
        return with_value(not_this(toucher, seen, "the content after the trap"), trapped);
    return gm_trial_yes(trapped);
}

struct gm_trial gm_probe_trap(int backing, int modes, int present)
{
    gm_auto_arena arena = GM_NO_ARENA;
    gm_auto_toucher toucher = GM_NO_TOUCHER;
    struct uffd_msg message;
    int how = modes & GM_PROBE_MINOR ? GM_PROBE_CONTINUE : GM_PROBE_COPY;
    int error, seen;
    struct gm_trial trial = set_up(&arena, backing, modes, 0);

    if (trial.ok != 1)
        return trial;
    /* A missing fault comes before the page is looked for; a page that is let through needs one. */
    if (arena.no_memory && !(modes & GM_PROBE_MISSING))
        return gm_trial_no_page(&arena, arena.no_memory);
    error = present ? gm_arena_fill(&arena) : 0;
    if (error)
        return gm_trial_no_page(&arena, error);
    trial = gm_toucher_start(&toucher, &arena, GM_DEED_READ);
    if (trial.ok != 1)
        return trial;
    seen = gm_toucher_await(&toucher, &message);
    return is_trap(seen) ? release(&toucher, how, present, seen)
                         : not_this(&toucher, seen, "the kernel's own read of the page");
}

struct gm_trial gm_probe_wake(int backing)
{
    gm_auto_arena arena = GM_NO_ARENA;
    gm_auto_toucher toucher = GM_NO_TOUCHER;
    struct uffd_msg message;
    struct uffdio_range range;
    int seen;
    struct gm_trial trial = set_up(&arena, backing, GM_PROBE_MISSING, 0);

    if (trial.ok == 1)
        trial = gm_toucher_start(&toucher, &arena, GM_DEED_READ);
    if (trial.ok != 1)
        return trial;
    seen = gm_toucher_await(&toucher, &message);
    if (!is_trap(seen))
        return not_this(&toucher, seen, "the first fault");
    range = (struct uffdio_range){(uint64_t)(uintptr_t)arena.range, arena.page};
    if (ioctl(arena.uffd, UFFDIO_WAKE, &range) < 0)
        return gm_trial_no("UFFDIO_WAKE", errno);
    seen = gm_toucher_await(&toucher, &message);
    return is_trap(seen) ? gm_trial_yes(0)
                         : not_this(&toucher, seen, "the second fault, after UFFDIO_WAKE");
}

struct gm_trial gm_probe_thread_id(int backing)
{
    gm_auto_arena arena = GM_NO_ARENA;
    gm_auto_toucher toucher = GM_NO_TOUCHER;
    struct uffd_msg message;
    int seen;
    struct gm_trial trial = set_up(&arena, backing, GM_PROBE_MISSING, UFFD_FEATURE_THREAD_ID);

    if (trial.ok == 1)
        trial = gm_toucher_start(&toucher, &arena, GM_DEED_READ);
    if (trial.ok != 1)
        return trial;
    seen = gm_toucher_await(&toucher, &message);
    if (!is_trap(seen))
        return not_this(&toucher, seen, "the fault");
    if (message.arg.pagefault.feat.ptid != (uint32_t)atomic_load(&toucher.tid))
        return gm_trial_no("the message names another thread", 0);
    return gm_trial_yes(0);
}

struct gm_trial gm_probe_event_remove(int backing)
{
    gm_auto_arena arena = GM_NO_ARENA;
    gm_auto_toucher toucher = GM_NO_TOUCHER;
    struct uffd_msg message;
    int error, seen;
    struct gm_trial trial = set_up(&arena, backing, GM_PROBE_MINOR, UFFD_FEATURE_EVENT_REMOVE);

    if (trial.ok != 1)
        return trial;
    error = gm_arena_fill(&arena);
    if (error)
        return gm_trial_no_page(&arena, error);
    trial = gm_toucher_start(&toucher, &arena, GM_DEED_REMOVE);
    if (trial.ok != 1)
        return trial;
    seen = gm_toucher_await(&toucher, &message);
    if (seen != GM_PROBE_SEEN_OTHER || message.event != UFFD_EVENT_REMOVE)
        return not_this(&toucher, seen, "MADV_REMOVE");
    if (message.arg.remove.start != (uint64_t)(uintptr_t)arena.range ||
        message.arg.remove.end != message.arg.remove.start + arena.page)
        return gm_trial_no("the event names another range", 0);
    return gm_trial_yes(0);
}
