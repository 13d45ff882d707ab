#ifndef GMEMD_VMM_UFFD_H
#define GMEMD_VMM_UFFD_H

/* A userfaultfd that traps KVM's accesses, too. Ends the process if there is none. */
int uffd_create(void);

#endif
