/* What memory must be, computed from seed, pattern and step counters, without a look at it. */
#ifndef GMEMD_VMM_MODEL_H
#define GMEMD_VMM_MODEL_H

#include "guest.h"

/* The version of every data page after the fill; to be freed by the caller. */
uint32_t *model_filled(const struct guest_params *params);

/* Brings versions from the steps `from` of each vCPU to `to`. */
void model_replay(const struct guest_params *params, const uint64_t *from, const uint64_t *to,
                  uint32_t *versions);

/* The index of the first word of a page that is not what it must be; GUEST_WORDS if all are. */
uint64_t model_differs(const struct guest_params *params, uint64_t page, uint32_t version,
                       const uint64_t *words, uint64_t *ret_expected);

#endif
