/* What went wrong, said where it is known best: a message for people, and whose fault it is. */
#ifndef GM_PROBLEM_H
#define GM_PROBLEM_H

/* python */
enum gm_blame {
    GM_NOBODY,
    GM_PEER,   /* the other host broke the protocol */
    GM_VMM,    /* what the VMM handed over does not hold, or no longer */
    GM_KERNEL, /* the kernel refused what it should have done */
    GM_LINK,   /* a connection ended */
    GM_UNTRUSTED, /* the other host has not shown that it is one of ours, or does not take us for one */
};

struct gm_problem {
    int blame;
    int error; /* errno, or 0 */
    char text[512];
};
/* end python */

/* Fills *ret and returns -1, so that a failing function ends with `return gm_blame(...)`. */
int gm_blame(struct gm_problem *ret, enum gm_blame blame, int error, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* The same problem, with the place that it was found in before it. */
int gm_blame_in(struct gm_problem *ret, const struct gm_problem *why, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

#endif
