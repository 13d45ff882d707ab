#include "secrecy.h"

#include <errno.h>
#include <sys/prctl.h>

int gm_keep_secret(struct gm_problem *ret)
{
    if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0)
        return gm_blame(ret, GM_KERNEL, errno, "the process cannot be made undumpable");
    return 0;
}
