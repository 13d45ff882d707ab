/* The page that a probe plays with: a memory file of one page, mapped twice. For probe*.c alone. */
#ifndef GM_PROBE_ARENA_H
#define GM_PROBE_ARENA_H

#include "probe.h"

#include <errno.h>
#include <stddef.h>
#include <stdint.h>

#define GM_PROBE_FILL 0xa5
#define GM_PROBE_FILL_WORD UINT64_C(0xa5a5a5a5a5a5a5a5)

struct gm_arena {
    int vm;        /* guest_memfd only, else -1 */
    int file;      /* -1 for anonymous memory */
    int uffd;      /* -1 until opened */
    int no_memory; /* the errno of reserving a huge page where none can be had, else 0 */
    size_t page;
    char *range;   /* what is registered and touched */
    char *alias;   /* the second mapping; NULL for anonymous memory */
    char *content; /* a page of GM_PROBE_FILL */
};

#define GM_NO_ARENA {.vm = -1, .file = -1, .uffd = -1}
#define gm_auto_arena __attribute__((cleanup(gm_arena_close))) struct gm_arena

static inline struct gm_trial gm_trial_yes(long long value)
{
    return (struct gm_trial){.ok = 1, .value = value, .step = ""};
}

static inline struct gm_trial gm_trial_no(const char *step, int error)
{
    return (struct gm_trial){.ok = 0, .error = error, .step = step};
}

static inline struct gm_trial gm_trial_untried(const char *step, int error)
{
    return (struct gm_trial){.ok = -1, .error = error, .step = step};
}

/* The outcome of a system call that gives a negative number when it fails. */
static inline struct gm_trial gm_trial_call(long result, const char *step)
{
    return result < 0 ? gm_trial_no(step, errno) : gm_trial_yes(0);
}

/* The trial could not be made for want of a page; `error` is that of gm_arena_fill. */
static inline struct gm_trial gm_trial_no_page(const struct gm_arena *arena, int error)
{
    return gm_trial_untried(arena->no_memory ? "reserving a huge page" : "filling a page", error);
}

/* Makes and maps the page, absent; a failure is "untried". */
struct gm_trial gm_arena_open(struct gm_arena *arena, int backing);
void gm_arena_close(struct gm_arena *arena);

/* Makes the page present, through the alias. 0 or an errno. */
int gm_arena_fill(const struct gm_arena *arena);

/* Whoever waits for a page goes on after this. */
void gm_arena_drop_uffd(struct gm_arena *arena);

/* Copies by the kernel's hand, so that a bad page is EFAULT and not SIGBUS. 0 or an errno. */
int gm_probe_transfer(void *to, const void *from, size_t length);

/* Each returns a descriptor, or -1 with the step that failed. */
int gm_probe_make_vm(const char **step);
int gm_probe_make_guest_memfd(int vm, size_t size, uint64_t flags, const char **step);

#endif
