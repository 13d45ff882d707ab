/*
 * Theory of operation
 *
 * A page is missing, in flight (claimed) or received. Whoever turns its claimed bit on is the only one to write its content, once;
 * every other copy that arrives is dropped. The received bit follows the content, and the continue follows the received bit:
 * whoever dies in between leaves a page that is asked for again, or one that is continued again, and neither harms.
 *
 * Removal (balloon, MADV_REMOVE) cuts across this. The VMM's thread sleeps in madvise() until the pager has read the event, and then
 * punches the page out, at any time from then on. A lane thread that is populating that page may write it after the punch, and
 * would bring its old content back. Therefore:
 *
 *   the pager counts itself in `reading`, reads, notes each removed page that is in flight in the slot of the lane that has it, and
 *   counts itself out;
 *   a lane announces its frame in its slot before it claims, and between populating and marking waits until nobody is reading. A
 *   removal whose punch may have come before the populate was read before it, so its note is there by then, and the lane takes the
 *   page out again before anybody can see it;
 *   what cannot be taken out stays claimed, unseen, and noted in the slot, also for a successor: the lane goes on once it is out;
 *   a removal that is read later is punched later, and needs nobody's help;
 *   but a lane that gives its claim back would leave the page missing, and a note that comes too late would be lost with it. So it
 *   keeps the pager from reading until the page is either missing or, if it was removed, received.
 *
 * A received page that is absent from the page cache is therefore a hole, whether the source said so or the VMM took it out, and a
 * fault on it is answered with zeros.
 */
#include "install.h"

#include "cleanup.h"
#include "clock.h"
#include "cuts.h"
#include "digest.h"
#include "guard.h"
#include "kill_point.h"
#include "memfile.h"
#include "memory_layout.h"
#include "release.h"
#include "uffd.h"

#include <errno.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/stat.h>

/* A hole is made present and mapped in two steps, and the VMM may take the page out in between; then again, but not for ever: a VMM that has
 * mapped another file than it handed over never sees it. */
enum { HOLE_ATTEMPTS = 8 };

static void wait_for_events(const struct gm_destination *d)
{
    while (atomic_load(&d->reading))
        sched_yield();
}

void gm_install_events_begin(struct gm_destination *d)
{
    atomic_fetch_add(&d->reading, 1);
    while (atomic_load(&d->giving_up)) {
        atomic_fetch_sub(&d->reading, 1);
        sched_yield();
        atomic_fetch_add(&d->reading, 1);
    }
}

void gm_install_events_end(struct gm_destination *d)
{
    atomic_fetch_sub(&d->reading, 1);
}

/* Sets the received bits, and only then lets vCPUs pass. Returns how many pages were not received before. */
static uint64_t receive(struct gm_region *r, uint64_t first, uint64_t count)
{
    uint64_t pages = gm_bitmap_set(r->received, first, count);

    if (r->userfault)
        gm_bitmap_clear(r->userfault, first, count);
    return pages;
}

void gm_install_count(struct gm_destination *d, uint64_t pages)
{
    struct gm_memory *m = d->memory;

    if (pages && atomic_fetch_add(&m->received, pages) + pages == m->pages)
        gm_destination_tell(d, GM_EVENT_COMPLETE, NULL);
}

static uint64_t receive_all(struct gm_region *r, uint64_t first, uint64_t mask)
{
    uint64_t pages = 0;
    unsigned run;

    for (unsigned at = 0; (run = gm_mask_run(mask, &at)); at += run)
        pages += receive(r, first + at, run);
    return pages;
}

/* Takes out what the VMM removed. Returns what of it is there still. */
static uint64_t take_out(const struct gm_region *r, uint64_t first, uint64_t removed, struct gm_problem *ret)
{
    uint64_t left = 0;
    unsigned run;

    for (unsigned at = 0; (run = gm_mask_run(removed, &at)); at += run) {
        uint64_t page = first + at;
        int error = gm_memfile_punch(r->fd, gm_file_offset(r, page), gm_bytes(r, run));

        if (!error)
            continue;
        left |= gm_ones(at, run);
        gm_blame(ret, error == -EPERM ? GM_VMM : GM_KERNEL, -error,
                 "region %u: pages %llu to %llu, which the VMM removed while they came, cannot be cleared", r->index,
                 (unsigned long long)page, (unsigned long long)(page + run - 1));
    }
    return left;
}

/* What a lane's frame before has left to be taken out. */
static int finish_former(struct gm_destination *d, unsigned lane, struct gm_problem *ret)
{
    GM_LOCKED(&d->lock); /* the lane's next frame, and who tries it for a lane that has none */
    struct gm_inflight *slot = &d->memory->state->inflight[lane];
    struct gm_span former = gm_span_read(atomic_load(&slot->span));
    struct gm_region *r = &d->memory->region[former.region];
    uint64_t unfinished = atomic_load(&d->unfinished[lane]), left;

    if (!unfinished)
        return 0;
    left = take_out(r, former.first, unfinished, ret);
    gm_install_count(d, receive_all(r, former.first, unfinished & ~left));
    gm_destination_kick(d);
    if (!left)
        atomic_store(&slot->span, 0);
    atomic_store(&d->unfinished[lane], left);
    return left ? -1 : 0;
}

void gm_install_retry(struct gm_destination *d)
{
    struct gm_problem problem;

    for (unsigned lane = 0; lane < GM_MAX_LANES; lane++)
        if (atomic_load(&d->unfinished[lane]) && finish_former(d, lane, &problem) < 0)
            gm_destination_tell(d, GM_EVENT_STUCK, &problem);
}

int gm_install_begin(struct gm_install *in, struct gm_destination *d, unsigned lane, struct gm_region *r,
                     uint64_t first, unsigned count, struct gm_problem *ret)
{
    if (atomic_load(&d->unfinished[lane]) && finish_former(d, lane, ret) < 0)
        return -1;
    *in = (struct gm_install){
        .destination = d,
        .region = r,
        .slot = &d->memory->state->inflight[lane],
        .lane = lane,
        .first = first,
        .count = count,
        .began_ns = lane ? 0 : gm_now_ns(),
    };
    wait_for_events(d);
    atomic_store(&in->slot->removed, 0);
    atomic_store(&in->slot->span, gm_span_word((struct gm_span){first, r->index, count}));
    in->claimed = gm_bitmap_claim(r->claimed, first, count);
    GM_COUNT(d, dropped_pages, (unsigned)__builtin_popcountll(gm_ones(0, count) & ~in->claimed));
    gm_kill_point("claimed", 0);
    return 0;
}

static bool cut_short(const struct gm_region *r, uint64_t end)
{
    struct stat st;

    return fstat(r->fd, &st) < 0 || (uint64_t)st.st_size < gm_file_offset(r, end);
}

/* That a store failed says nothing of the reason: the VMM has truncated its file, or the host has no room, which fallocate() tells. */
static int store_in(unsigned char *mapping, const struct gm_region *r, uint64_t page, unsigned count,
                    const unsigned char *data)
{
    size_t length = gm_bytes(r, count);
    unsigned char *to = mapping + gm_bytes(r, page);
    int error = gm_guarded_store(to, data, length);

    if (!error || cut_short(r, page + count))
        return error;
    error = gm_memfile_zero(r->fd, gm_file_offset(r, page), length);
    return error ? error : gm_guarded_store(to, data, length);
}

static int store(struct gm_region *r, uint64_t page, unsigned count, const unsigned char *data,
                 struct gm_problem *ret)
{
    size_t length = gm_bytes(r, count);

    /* Nobody who waits for a page waits for 2 MiB of zeros around it. */
    if (r->singles && count == 1)
        return store_in(r->singles, r, page, count, data);
    if (r->populate == GM_POPULATE_WRITE) {
        int error = gm_memfile_write(r->fd, data, length, gm_file_offset(r, page));

        /* EEXIST: the page has left the direct map, which says nothing of its content. The claim is ours, so it is not
         * received, and a mapping still reaches it. */
        if (error != -EEXIST)
            return error;
        if (gm_region_map_alias(r, ret) < 0)
            return -ret->error;
    }
    return store_in(r->alias, r, page, count, data);
}

/* A page is a hole from the beginning, unless an attempt to populate it failed half-way. */
static int make_hole(struct gm_region *r, uint64_t page, unsigned count)
{
    return atomic_load(&r->soiled) ? gm_memfile_punch(r->fd, gm_file_offset(r, page), gm_bytes(r, count)) : 0;
}

int gm_install_populate(struct gm_install *in, const unsigned char *data, struct gm_problem *ret)
{
    struct gm_region *r = in->region;
    unsigned run;

    in->hole = !data;
    for (unsigned at = 0; (run = gm_mask_run(in->claimed, &at)); at += run) {
        uint64_t page = in->first + at;
        int error;

        gm_kill_point("half-populated",
                      data && gm_memfile_write(r->fd, data + gm_bytes(r, at), gm_bytes(r, 1) / 2,
                                               gm_file_offset(r, page)));
        error = data ? store(r, page, run, data + gm_bytes(r, at), ret) : make_hole(r, page, run);

        if (error)
            return gm_blame(ret, error == -EFAULT || error == -EINVAL ? GM_VMM : GM_KERNEL, -error,
                            "region %u: pages %llu to %llu cannot be put in place", r->index,
                            (unsigned long long)page, (unsigned long long)(page + run - 1));
    }
    return 0;
}

/* Takes out again what the VMM removed while it was in flight: those pages are received, as holes. What cannot be taken out is no longer
 * in `claimed`, and nobody else claims it. */
static uint64_t drop_removed(struct gm_install *in)
{
    struct gm_problem problem;
    uint64_t removed, left;

    wait_for_events(in->destination);
    removed = atomic_load(&in->slot->removed) & in->claimed;
    left = take_out(in->region, in->first, removed, &problem);
    if (left)
        gm_destination_tell(in->destination, GM_EVENT_STUCK, &problem);
    in->claimed &= ~left;
    in->left = left;
    return removed;
}

/* Returns how many pages that are, which are still to be counted. */
static uint64_t mark(struct gm_install *in, uint64_t mask)
{
    uint64_t pages = receive_all(in->region, in->first, mask);

    /* A successor finds in the slot what is left to be taken out. */
    if (in->left)
        atomic_store(&in->destination->unfinished[in->lane], in->left);
    else
        atomic_store(&in->slot->span, 0);
    return pages;
}

static void vmm_gone(struct gm_destination *d, int error)
{
    if (error == -ESRCH)
        gm_destination_tell(d, GM_EVENT_VMM_GONE, NULL);
}

/* Maps a run of received pages, and returns whether all of it is mapped. What is not, is left to the next fault on it. */
static bool map_run(struct gm_destination *d, struct gm_region *r, uint64_t first, unsigned count)
{
    uint64_t end = first + count;
    bool all = true;

    while (first < end) {
        uint64_t done;
        int error = gm_uffd_continue(r->uffd, r->hva + gm_bytes(r, first), gm_bytes(r, end - first),
                                     gm_bytes(r, 1), &done);

        done >>= r->page_shift;
        if (done && gm_waits_any(&d->waits))
            gm_destination_end_waits(d, r, first, done);
        vmm_gone(d, error);
        all = all && !error;
        first += done + (error ? 1 : 0);
    }
    return all;
}

/* Who waits is woken. Else pages that were not asked for are left to the kernel (release.c), and vCPUs that ask by bit need no mapping. */
static bool wants_mapping(const struct gm_install *in)
{
    if (gm_waits_within(&in->destination->waits, in->region->index, in->first, in->count))
        return true;
    return in->began_ns && !in->region->userfault;
}

static void map_claimed(struct gm_install *in)
{
    struct gm_destination *d = in->destination;
    bool all = true;
    unsigned run;

    if (!wants_mapping(in))
        return;
    for (unsigned at = 0; (run = gm_mask_run(in->claimed, &at)); at += run)
        all = map_run(d, in->region, in->first + at, run) && all;
    gm_kill_point("continued", 0);
    if (!all && gm_waits_any(&d->waits))
        gm_destination_kick(d);
}

/* Whether the VMM has cut into the page: a huge one, alone in its frame. As with removals: it was read before it can have been punched. */
static bool was_cut(const struct gm_install *in)
{
    if (gm_frame_pages(in->region) > 1 || !in->claimed || in->hole)
        return false;
    wait_for_events(in->destination);
    return gm_cuts_any(in->destination->memory, in->region, in->first);
}

void gm_install_finish(struct gm_install *in)
{
    struct gm_digest_frame digests;
    struct gm_problem problem;
    uint64_t removed, cut, pages;

    /* Before was_cut() and drop_removed(), which know of every removal whose punch may have come before this. */
    gm_digest_make(&digests, in->destination->memory, in->region, in->first, in->claimed, in->hole);
    cut = was_cut(in);
    if (cut && gm_cuts_clear(in->destination->memory, in->region, in->first, &problem) < 0) {
        gm_install_give_up(in);
        in->claimed = 0;
        gm_destination_tell(in->destination, GM_EVENT_STUCK, &problem);
        return;
    }
    removed = drop_removed(in) | cut;
    gm_digest_put(&digests, in->region, in->first, in->claimed & ~removed);
    gm_digest_leave_out(in->destination->memory, in->region, in->first, removed);
    gm_kill_point("populated", 0);
    pages = mark(in, in->claimed);
    gm_kill_point("marked", 0);
    map_claimed(in);
    if (pages && in->lane)
        gm_release_behind(in->destination->memory, &in->destination->trail[in->lane], in->region, in->first, in->count);
    /* Last: who hears that all is complete gives the userfaultfd back to the VMM, which may use it for something else. */
    gm_install_count(in->destination, pages);
    if (in->began_ns)
        gm_histogram_record(&in->destination->installing, gm_now_ns() - in->began_ns);
}

bool gm_install_give_up(struct gm_install *in)
{
    struct gm_destination *d = in->destination;
    uint64_t removed;
    bool cut;

    atomic_fetch_add(&d->giving_up, 1);
    cut = was_cut(in);
    removed = drop_removed(in);
    atomic_store(&in->region->soiled, true);
    gm_bitmap_give_back(in->region->claimed, in->first, in->claimed & ~removed);
    gm_install_count(d, mark(in, removed & in->claimed));
    atomic_fetch_sub(&d->giving_up, 1);
    if (removed && gm_waits_any(&d->waits))
        gm_destination_kick(d);
    return removed || cut;
}

int gm_install_hole(struct gm_destination *d, struct gm_region *r, uint64_t first, unsigned count, uint64_t *pages,
                    struct gm_problem *ret)
{
    /* Without a slot: a removal that comes meanwhile is noted nowhere, and makes zero what is zero at the source, too. */
    uint64_t missing = gm_bitmap_claim(r->claimed, first, count);
    struct gm_digest_frame digests;
    int error = 0;
    unsigned run;

    gm_digest_make(&digests, d->memory, r, first, missing, true);
    gm_digest_put(&digests, r, first, missing);
    for (unsigned at = 0; (run = gm_mask_run(missing, &at)); at += run) {
        error = make_hole(r, first + at, run);
        if (error) {
            gm_bitmap_give_back(r->claimed, first + at, missing >> at);
            first += at;
            break;
        }
        *pages += receive(r, first + at, run);
    }
    if (error)
        return gm_blame(ret, GM_KERNEL, -error, "region %u: a hole of %u pages at page %llu", r->index, run,
                        (unsigned long long)first);
    return 0;
}

/* Notes pages of [first, first + 64) that are in flight in the slots that have them. */
static void note_removed(struct gm_destination *d, const struct gm_region *r, uint64_t first, uint64_t pages)
{
    for (unsigned i = 0; i < GM_MAX_LANES; i++) {
        struct gm_inflight *slot = &d->memory->state->inflight[i];
        uint64_t word = atomic_load(&slot->span), mask = 0;
        struct gm_span span = gm_span_read(word);

        if (!word || span.region != r->index)
            continue;
        for (unsigned bit = 0; bit < span.count; bit++) {
            uint64_t page = span.first + bit;

            if (page >= first && page - first < 64 && pages >> (page - first) & 1)
                mask |= UINT64_C(1) << bit;
        }
        atomic_fetch_or(&slot->removed, mask);
        /* The lane may have gone on to another frame; it cannot have looked at the note yet. */
        if (atomic_load(&slot->span) != word)
            atomic_fetch_and(&slot->removed, ~mask);
    }
}

void gm_install_removed(struct gm_destination *d, struct gm_region *r, uint64_t first, uint64_t count)
{
    GM_COUNT(d, removed_pages, count);
    while (count) {
        unsigned here = count < 64 ? (unsigned)count : 64;
        uint64_t missing = gm_bitmap_claim(r->claimed, first, here);
        uint64_t flying = 0;

        for (unsigned i = 0; i < here; i++)
            if (!(missing >> i & 1) && !gm_bitmap_test(r->received, first + i))
                flying |= UINT64_C(1) << i;
        gm_digest_leave_out(d->memory, r, first, missing);
        if (flying)
            note_removed(d, r, first, flying);
        gm_install_count(d, receive_all(r, first, missing));
        first += here;
        count -= here;
    }
}

/* A load brings a zero page in without writing to it: who has mapped it meanwhile may have written. */
static int fill_hole(struct gm_region *r, uint64_t page)
{
    char byte;

    if (r->singles && gm_guarded_load(&byte, r->singles + gm_bytes(r, page), sizeof byte) == 0)
        return 0;
    return gm_memfile_zero(r->fd, gm_file_offset(r, page), gm_bytes(r, 1));
}

int gm_install_continue(struct gm_destination *d, struct gm_region *r, uint64_t page)
{
    int error = -EFAULT;

    for (int i = 0; i < HOLE_ATTEMPTS && error == -EFAULT; i++) {
        uint64_t done;

        error = gm_uffd_continue(r->uffd, r->hva + gm_bytes(r, page), gm_bytes(r, 1), gm_bytes(r, 1), &done);
        if (error == -EFAULT) {
            int absent = fill_hole(r, page);

            error = absent ? absent : -EFAULT;
        }
    }
    vmm_gone(d, error);
    if (!error || error == -ENOENT || error == -ESRCH)
        gm_destination_end_waits(d, r, page, 1);
    return error;
}
