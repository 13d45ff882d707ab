/* vCPUs that left KVM_RUN for a page (KVM userfault): what they ask on the VMM's fault socket, and the answers. */
#ifndef GM_VCPUS_H
#define GM_VCPUS_H

#include "destination.h"

#include <stdbool.h>

/* Takes one request. Returns 1 with the wait and its region filled in, 0 if there is none, -1 if the VMM broke the protocol. */
int gm_vcpus_take_untrusted(const struct gm_destination *d, struct gm_wait *wait, struct gm_region **region,
                            struct gm_problem *ret);

/* Tells a vCPU that its page is there, and how many received pages lie from it on, so that the VMM may map them ahead. */
void gm_vcpus_answer(struct gm_destination *d, const struct gm_region *r, const struct gm_wait *wait);

/* Has every vCPU that waits ask again. False if there is no room even for that. */
bool gm_vcpus_ask_again(struct gm_destination *d);

#endif
