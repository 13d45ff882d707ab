#include "userfault.h"

#include "memfile.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/stat.h>

int gm_userfault_map(struct gm_region *r, int fd, uint64_t offset, struct gm_problem *ret)
{
    uint64_t needed = offset + gm_bitmap_words(r->pages) * sizeof(gm_word);
    int seals = fcntl(fd, F_GET_SEALS);
    uint64_t page_size;
    struct stat st;
    void *map;

    /* Pages of hugetlb may be missing when they are touched, and that ends the process. */
    if (seals < 0 || gm_memfile_kind(fd, &page_size, ret) != GM_SHMEM)
        return gm_blame(ret, GM_VMM, 0, "region %u: its userfault bitmap is no memfd of base pages: sent by the VMM", r->index);
    if (!(seals & F_SEAL_SHRINK))
        return gm_blame(ret, GM_VMM, 0, "region %u: its userfault bitmap is not sealed against shrinking: sent by the VMM",
                        r->index);
    if (fstat(fd, &st) < 0 || offset % sizeof(gm_word) || needed < offset || (uint64_t)st.st_size < needed)
        return gm_blame(ret, GM_VMM, 0, "region %u: its userfault bitmap has %lld bytes, %llu are needed: sent by the VMM",
                        r->index, (long long)st.st_size, (unsigned long long)needed);
    map = mmap(NULL, needed, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED)
        return gm_blame(ret, GM_VMM, errno, "region %u: its userfault bitmap", r->index);
    r->userfault_map = map;
    r->userfault_size = needed;
    r->userfault = (gm_word *)((char *)map + offset);
    return 0;
}

void gm_userfault_unmap(struct gm_region *r)
{
    if (r->userfault_map)
        munmap(r->userfault_map, r->userfault_size);
    r->userfault_map = NULL;
    r->userfault = NULL;
}

void gm_userfault_sync(struct gm_region *r)
{
    for (size_t word = 0; r->userfault && word < gm_bitmap_words(r->pages); word++)
        atomic_fetch_and(&r->userfault[word], ~atomic_load(&r->received[word]));
}
