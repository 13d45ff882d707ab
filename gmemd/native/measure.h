/* How long each way to populate takes here. */
#ifndef GM_MEASURE_H
#define GM_MEASURE_H

#include "problem.h"

#include <stdint.h>

/* python */
/*
 * Takes `length` bytes from a socket and puts them into an empty memory file from its beginning, in the way given (enum gm_populate).
 * Returns nanoseconds, or -1 where that way does not work on this file.
 */
int64_t gm_measure_populate(int fd, int populate, uint64_t length, struct gm_problem *ret);
/* end python */

#endif
