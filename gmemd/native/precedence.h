/*
 * Who goes first on a CPU that several threads want: those that vCPUs wait for.
 *
 * A lower nice value needs RLIMIT_NICE (LimitNICE= in a unit) or CAP_SYS_NICE. A short slice needs nothing: who has one runs as soon as
 * it wakes, in place of who has a long one, from Linux 6.12 on (85e511df3cec); before, it is ignored.
 */
#ifndef GM_PRECEDENCE_H
#define GM_PRECEDENCE_H

#include <stdint.h>

/* python */
#define GM_FIRST_NICE -15 /* 28 times the share of a thread at 0; -20 is left for what the host itself depends on */
/* end python */

/* struct sched_attr as of SCHED_ATTR_SIZE_VER0; <linux/sched/types.h> clashes with the C library's <sched.h>. */
struct gm_precedence {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime_ns, deadline_ns, period_ns;
};

/* This thread goes first from now on, as far as it may. Returns what it was. */
struct gm_precedence gm_go_first(void);

/* As it was, before the thread is given other work. */
void gm_go_as_before(const struct gm_precedence *before);

/* First until the end of the scope. */
#define GM_GOES_FIRST \
    __attribute__((cleanup(gm_go_as_before), unused)) const struct gm_precedence gm_before = gm_go_first()

#endif
