#include "precedence.h"

#include <sys/syscall.h>
#include <unistd.h>

enum { SHORT_SLICE_NS = 100000 }; /* the shortest that there is: a page is answered in less */

static int set(const struct gm_precedence *p)
{
    return (int)syscall(SYS_sched_setattr, 0, p, 0);
}

struct gm_precedence gm_go_first(void)
{
    struct gm_precedence before = {0}, first;

    if (syscall(SYS_sched_getattr, 0, &before, sizeof before, 0) < 0)
        return (struct gm_precedence){0};
    first = before;
    first.runtime_ns = SHORT_SLICE_NS;
    if (first.nice > GM_FIRST_NICE)
        first.nice = GM_FIRST_NICE;
    if (set(&first) < 0) {
        first.nice = before.nice;
        set(&first);
    }
    return before;
}

void gm_go_as_before(const struct gm_precedence *before)
{
    if (before->size)
        set(before);
}
