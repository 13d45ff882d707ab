/* Memory files: made, recognised, read, and given zeros. */
#ifndef GM_MEMFILE_H
#define GM_MEMFILE_H

#include "problem.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* python */
enum gm_kind {
    GM_FILE,        /* a regular file on a disk: a source only */
    GM_SHMEM,       /* memfd, tmpfs, /dev/shm */
    GM_HUGETLB,     /* hugetlb memfd, hugetlbfs */
    GM_GUEST_MEMFD, /* KVM's own */
};

/* Flags of a guest_memfd. */
#define GM_GUEST_MEMFD_MMAP 1
#define GM_GUEST_MEMFD_INIT_SHARED 2
#define GM_GUEST_MEMFD_NO_DIRECT_MAP 4
#define GM_GUEST_MEMFD_WRITE 8

/* Each makes a file of `size` bytes and returns its descriptor. `huge_page` is the page size in bytes, 0 for base pages. */
int gm_memfile_memfd(const char *name, uint64_t size, uint64_t huge_page, struct gm_problem *ret);
int gm_memfile_guest_memfd(uint64_t size, uint64_t flags, struct gm_problem *ret);

/* What a descriptor is: a gm_kind and its page size in bytes; -1 if it is no memory file. */
int gm_memfile_kind(int fd, uint64_t *page_size, struct gm_problem *ret);

/* Whether a range holds no page at all: 1 yes, 0 no, -1 cannot be told. */
int gm_memfile_empty(int fd, uint64_t offset, uint64_t length);

/* Whether a mapping of a file that is empty at `offset` shows its pages: 0, or -ENODEV if it cannot be mapped, -EFAULT if its pages
 * are not shared. Leaves it as empty as it was. */
int gm_memfile_shown(int fd, uint64_t offset);

/* The next range at or after `from` and before `end` that may hold data, into out[0] (start) and out[1] (end); 0 if none. What a file that
 * ends before `end` lacks may have been data: to read it is an error. */
int gm_memfile_data(int fd, uint64_t from, uint64_t end, uint64_t *out);

/* Whether a write() of one page to it may bring a large folio in. */
int gm_memfile_large_folios(int fd);
/* end python */

/* Makes absent pages of the range present and zero, without touching present ones. 0 or -errno. */
int gm_memfile_zero(int fd, uint64_t offset, uint64_t length);

/* Takes the pages of the range out: they are absent, and zero, from then on. 0 or -errno. */
int gm_memfile_punch(int fd, uint64_t offset, uint64_t length);

/* Writes all of it, or returns -errno (-EIO for a write that goes nowhere). */
int gm_memfile_write(int fd, const void *from, size_t length, uint64_t offset);

/* Reads all of it, or returns -errno (-ENODATA at the end of the file). */
int gm_memfile_read(int fd, void *to, size_t length, uint64_t offset);

bool gm_is_zero(const void *data, size_t length);

#endif
