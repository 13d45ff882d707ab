/* The userfault bitmap of a slot: shared with the VMM and read by KVM. A set bit makes a vCPU ask for the page. */
#ifndef GM_USERFAULT_H
#define GM_USERFAULT_H

#include "memory.h"

/* Maps the bitmap of a region: `pages` bits from byte `offset` of a memfd that is sealed against shrinking. */
int gm_userfault_map(struct gm_region *r, int fd, uint64_t offset, struct gm_problem *ret);
void gm_userfault_unmap(struct gm_region *r);

/* Lets vCPUs pass to every received page. */
void gm_userfault_sync(struct gm_region *r);

#endif
