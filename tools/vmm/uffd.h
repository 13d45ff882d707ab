#ifndef GMEMD_VMM_UFFD_H
#define GMEMD_VMM_UFFD_H

/* A userfaultfd of this process that also traps the accesses of KVM; ends the process if there is none. */
int uffd_create(void);

#endif
