/*
 * Where tests have the daemon die in the middle of an install. Only a build with -DGM_KILL_POINTS has these points; in any other they
 * are nothing. There, the environment names one, and how often it is to be passed first: GM_KILL_POINT=claimed:17.
 */
#ifndef GM_KILL_POINT_H
#define GM_KILL_POINT_H

#ifdef GM_KILL_POINTS
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static inline int gm_kill_due(const char *name)
{
    static _Atomic long passed;
    const char *wanted = getenv("GM_KILL_POINT");
    size_t length = strlen(name);

    if (!wanted || strncmp(wanted, name, length) || wanted[length] != ':')
        return 0;
    return atomic_fetch_add(&passed, 1) == atol(wanted + length + 1);
}

#define gm_kill_point(name, last_act)                                                                              \
    do {                                                                                                           \
        if (gm_kill_due(name)) {                                                                                   \
            (void)(last_act);                                                                                      \
            raise(SIGKILL);                                                                                        \
        }                                                                                                          \
    } while (0)
#else
#define gm_kill_point(name, last_act) ((void)0)
#endif

#endif
