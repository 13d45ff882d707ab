/* userfaultfd, one function an ioctl. Addresses are those of the process that made the descriptor. */
#ifndef GM_UFFD_H
#define GM_UFFD_H

#include "problem.h"

#include <stdint.h>

/* python */
#define GM_UFFD_MISSING 1
#define GM_UFFD_MINOR 2

/* Opens one, non-blocking, with the API handshake done: through /dev/userfaultfd, or else the system call. Returns the descriptor. */
int gm_uffd_open(uint64_t features, struct gm_problem *ret);

/* Registers for both kinds of fault, or for MINOR alone where the mapping takes no more. Returns the GM_UFFD_ modes. */
int gm_uffd_register(int uffd, uint64_t start, uint64_t length, struct gm_problem *ret);

/* These return 0 or -errno. Who waits for a page of what is unregistered is woken. */
int gm_uffd_unregister(int uffd, uint64_t start, uint64_t length);
int gm_uffd_wake(int uffd, uint64_t start, uint64_t length);
int gm_uffd_copy(int uffd, uint64_t to, const void *from, uint64_t length);
int gm_uffd_zero(int uffd, uint64_t start, uint64_t length);

/*
 * Maps pages that are in the page cache and wakes who waits for them; a page that is mapped already is woken and passed over.
 * Returns 0, or -errno with the number of bytes done before it: EFAULT (no page in the page cache), EAGAIN (an event
 * waits to be read), ENOENT (no longer mapped), ESRCH (the process is gone).
 */
int gm_uffd_continue(int uffd, uint64_t start, uint64_t length, uint64_t page_size, uint64_t *done);

/* Reads at most `most` messages of 32 bytes. Returns how many, 0 if none waits, or -errno. */
int gm_uffd_read(int uffd, void *messages, unsigned most);
/* end python */

/* After the unregistering, before nobody reads any more: takes what messages there are, until no thread of the VMM waits for one of its
 * events to be read. 0, or -EAGAIN if one still does. The range is one of those that were registered. */
int gm_uffd_drain(int uffd, uint64_t start, uint64_t length);

#endif
