/*
 * A piece of guest memory in which nothing is missing needs no guard. It is unregistered as soon as it is complete, and
 * from then on the kernel maps it as it maps any file: by 2 MiB where the file has folios of that size, while UFFDIO_CONTINUE maps
 * each 4 KiB by itself. So the background maps nothing that nobody waits for: a guest that touches a page before its
 * piece is complete has a fault that is answered on the spot.
 *
 * UNREGISTER waits for the VMM's mmap_lock, for as long as the VMM fills memory or somebody reads its smaps; CONTINUE does not, since
 * Linux kernel commit 867a43a34ff8 ("userfaultfd: use per-vma locks in userfaultfd operations") (in v6.9). So the pager, which all guests share, leaves it to the lanes.
 *
 * Each piece cuts the VMM's mapping until its neighbours follow, and a process may have 65530 of them (vm.max_map_count). So there
 * are never more than PIECES, which are larger in larger guests.
 */
#include "release.h"

#include "bitmap.h"
#include "uffd.h"

enum {
    PIECE_BYTES = 2 * 1024 * 1024, /* what one entry of the page tables' middle level maps */
    PIECES = 16384,
};

/* What is let go at a time, in pages of the region: a power of two. */
static uint64_t piece_pages(const struct gm_memory *m, const struct gm_region *r)
{
    uint64_t pages = PIECE_BYTES >> r->page_shift;

    while (pages < m->pages / PIECES)
        pages *= 2;
    return pages;
}

static void let_go(struct gm_region *r, uint64_t first, uint64_t end)
{
    /* What fails, for want of memory or of a VMM, stays guarded, and its faults are answered. */
    if (first < end)
        gm_uffd_unregister(r->uffd, r->hva + gm_bytes(r, first), gm_bytes(r, end - first));
}

bool gm_release(struct gm_memory *m, struct gm_region *r, uint64_t first, uint64_t count)
{
    uint64_t piece = piece_pages(m, r), end = first + count;
    uint64_t at = first / piece * piece, from = at;
    bool all = true;

    for (uint64_t next; at < end; at = next) {
        next = at + piece < r->pages ? at + piece : r->pages;
        if (gm_bitmap_find(r->received, at, next, false) != next) {
            let_go(r, from, at);
            from = next;
            all = false;
        }
    }
    let_go(r, from, at);
    return all;
}

void gm_release_behind(struct gm_memory *m, struct gm_trail *trail, struct gm_region *r, uint64_t first, uint64_t count)
{
    struct gm_trail_piece now = {r->index, (first + count - 1) / piece_pages(m, r), !gm_release(m, r, first, count)};

    if (now.region != trail->here.region || now.number != trail->here.number) {
        struct gm_region *its = &m->region[trail->before.region];

        if (trail->before.open)
            gm_release(m, its, trail->before.number * piece_pages(m, its), 1);
        trail->before = trail->here;
    }
    trail->here = now;
}
