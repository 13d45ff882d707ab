/* What a process must not tell: it has pages of guests, and keys, in its memory. */
#ifndef GM_SECRECY_H
#define GM_SECRECY_H

#include "problem.h"

/* python */
/* From now on nothing of this process's memory is dumped, and only root may look into it, or take a descriptor from it. */
int gm_keep_secret(struct gm_problem *ret);
/* end python */

#endif
