/*
 * A successor takes a migration over from the state memfd. Whatever its predecessor was doing when it died, a page is in one of two
 * conditions: received, and then it is to be continued again; or not, and then it is to be asked for again, whoever had claimed it.
 */
#include "cleanup.h"
#include "cuts.h"
#include "memfile.h"
#include "memory.h"
#include "memory_layout.h"
#include "uapi.h"
#include "userfault.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

/* Whether something of the state lies behind all that was found before it; *used is moved to its end. */
static bool fits(const struct gm_state *state, uint64_t at, uint64_t bytes, uint64_t *used)
{
    if (at % sizeof(gm_word) || at < *used || at > state->size || bytes > state->size - at)
        return false;
    *used = at + bytes;
    return true;
}

static bool bitmap_fits(const struct gm_state *state, uint64_t at, uint64_t pages, uint64_t *used)
{
    return fits(state, at, gm_bitmap_words(pages) * sizeof(gm_word), used);
}

static const char *wrong_with_region(const struct gm_state *state, const struct gm_state_region *r, unsigned fds,
                                     uint64_t *used)
{
    if (r->pages == 0 || r->pages > UINT64_C(1) << 40)
        return "its number of pages";
    if (r->page_shift < 12 || r->page_shift > GM_MAX_PAGE_SHIFT)
        return "its page size";
    if (r->file_name >= fds || r->uffd_name >= fds || (r->has_bitmap && r->bitmap_name >= fds))
        return "its descriptors";
    if (r->populate < GM_POPULATE_WRITE || r->populate > GM_POPULATE_COPY)
        return "its way to populate";
    if (!bitmap_fits(state, r->claimed_at, r->pages, used) || !bitmap_fits(state, r->received_at, r->pages, used))
        return "where its bitmaps are";
    return NULL;
}

static int check_state(const struct gm_state *state, uint64_t file_size, unsigned fds, struct gm_problem *ret)
{
    uint64_t used = sizeof *state + state->regions * sizeof state->region[0];

    if (memcmp(state->magic, gm_state_magic, sizeof state->magic))
        return gm_blame(ret, GM_VMM, 0, "not a state of gmemd");
    if (state->version == 0 || state->version > GM_STATE_VERSION)
        return gm_blame(ret, GM_VMM, 0, "state of version %u (this gmemd knows up to %d)", state->version,
                        GM_STATE_VERSION);
    if (state->size != file_size || state->regions == 0 || state->regions > GM_MAX_REGIONS ||
        sizeof *state + state->regions * sizeof state->region[0] > file_size)
        return gm_blame(ret, GM_VMM, 0, "state damaged: %u regions, %llu bytes of %llu", state->regions,
                        (unsigned long long)state->size, (unsigned long long)file_size);
    if (!memchr(state->migration, 0, sizeof state->migration))
        return gm_blame(ret, GM_VMM, 0, "state damaged: its migration has no name");
    for (unsigned i = 0; i < state->regions; i++) {
        const char *wrong = wrong_with_region(state, &state->region[i], fds, &used);

        if (wrong)
            return gm_blame(ret, GM_VMM, 0, "state damaged: region %u: %s", i, wrong);
    }
    if (state->messages_at && !fits(state, state->messages_at, GM_MESSAGES * GM_MESSAGE_BYTES, &used))
        return gm_blame(ret, GM_VMM, 0, "state damaged: where its messages are");
    for (unsigned i = 0; i < GM_MAX_LANES; i++)
        if (gm_span_read(atomic_load(&state->inflight[i].span)).count > GM_FRAME_PAGES)
            return gm_blame(ret, GM_VMM, 0, "state damaged: the frame of lane %u", i);
    if (!gm_cuts_fit(state))
        return gm_blame(ret, GM_VMM, 0, "state damaged: what was cut out of a page");
    if (state->note[GM_NOTE_VCPUS] && state->note[GM_NOTE_FAULTS] >= fds)
        return gm_blame(ret, GM_VMM, 0, "state damaged: descriptor %llu of %u is its fault socket",
                        (unsigned long long)state->note[GM_NOTE_FAULTS], fds);
    return 0;
}

static struct gm_state *map_state(int fd, unsigned fds, struct gm_problem *ret)
{
    int seals = fcntl(fd, F_GET_SEALS);
    struct gm_state *state;
    struct stat st;

    if (fstat(fd, &st) < 0 || seals < 0 || !(seals & F_SEAL_SHRINK) || st.st_size < (off_t)sizeof *state) {
        gm_blame(ret, GM_VMM, 0, "not a state of gmemd: no sealed memfd of at least %zu bytes", sizeof *state);
        return MAP_FAILED;
    }
    state = mmap(NULL, (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (state == MAP_FAILED) {
        gm_blame(ret, GM_KERNEL, errno, "state of %llu bytes", (unsigned long long)st.st_size);
    } else if (check_state(state, (uint64_t)st.st_size, fds, ret) < 0) {
        munmap(state, (size_t)st.st_size);
        state = MAP_FAILED;
    }
    return state;
}

/* The VMM took pages out. What of them is not received may have been half-populated meanwhile. */
static int take_out(struct gm_region *r, uint64_t first, uint64_t count, struct gm_problem *ret)
{
    uint64_t end = first + count;

    while ((first = gm_bitmap_find(r->received, first, end, false)) < end) {
        uint64_t run_end = gm_bitmap_find(r->received, first, end, true);
        int error = gm_memfile_punch(r->fd, gm_file_offset(r, first), gm_bytes(r, run_end - first));

        if (error)
            return gm_blame(ret, GM_KERNEL, -error, "region %u: pages %llu to %llu", r->index,
                            (unsigned long long)first, (unsigned long long)run_end - 1);
        gm_bitmap_set(r->received, first, run_end - first);
        first = run_end;
    }
    return 0;
}

/* Removals that were read, and perhaps not acted upon. To do it twice is no harm: what is received is left alone. */
static int replay_messages(struct gm_memory *m, struct gm_problem *ret)
{
    struct uffd_msg *message = m->messages;

    for (unsigned at = 0; at < GM_MESSAGES; at++, message++) {
        if (message->event != UFFD_EVENT_REMOVE && message->event != UFFD_EVENT_UNMAP)
            continue;
        for (unsigned i = 0; i < m->count; i++) {
            uint64_t first, count;

            count = gm_region_clip(&m->region[i], message->arg.remove.start, message->arg.remove.end, &first);
            if (count && take_out(&m->region[i], first, count, ret) < 0)
                return -1;
            /* That there are too many is no reason to lose the guest: the daemon goes on with them, too. */
            gm_cuts_note(m, &m->region[i], message->arg.remove.start, message->arg.remove.end, ret);
        }
        message->event = 0;
    }
    return 0;
}

/* A page that the VMM took out while a lane was populating it: zero, and received. */
static int finish_removals(struct gm_memory *m, struct gm_problem *ret)
{
    for (unsigned i = 0; i < GM_MAX_LANES; i++) {
        struct gm_inflight *slot = &m->state->inflight[i];
        uint64_t removed = atomic_load(&slot->removed);
        struct gm_span span = gm_span_read(atomic_load(&slot->span));

        for (unsigned bit = 0; bit < span.count && span.region < m->count; bit++) {
            struct gm_region *r = &m->region[span.region];
            uint64_t page = span.first + bit;

            if (removed >> bit & 1 && page < r->pages && take_out(r, page, 1, ret) < 0)
                return -1;
        }
        atomic_store(&slot->span, 0);
    }
    return 0;
}

/* Claims that nobody holds any more are given back. */
static void forget_claims(struct gm_memory *m)
{
    uint64_t received = 0;

    for (unsigned i = 0; i < m->count; i++) {
        struct gm_region *r = &m->region[i];

        for (size_t word = 0; word < gm_bitmap_words(r->pages); word++)
            atomic_store(&r->claimed[word], atomic_load(&r->received[word]));
        received += gm_bitmap_count(r->received, r->pages);
        gm_userfault_sync(r);
        atomic_store(&r->soiled, true);
    }
    atomic_store(&m->received, received);
}

static int map_region(struct gm_region *r, const struct gm_state_region *known, const int *fds,
                      struct gm_problem *ret)
{
    if (gm_region_map(r, ret) < 0)
        return -1;
    if (known->has_bitmap && gm_userfault_map(r, fds[known->bitmap_name], known->bitmap_offset, ret) < 0)
        return -1;
    return 0;
}

static int bind_all(struct gm_memory *m, const int *fds, struct gm_problem *ret)
{
    for (unsigned i = 0; i < m->count; i++) {
        const struct gm_state_region *known = &m->state->region[i];

        gm_memory_bind(m, i, fds[known->file_name], fds[known->uffd_name]);
        if (map_region(&m->region[i], known, fds, ret) < 0)
            return -1;
    }
    return 0;
}

struct gm_memory *gm_memory_adopt(int state_fd, const int *fds, unsigned count, struct gm_problem *ret)
{
    struct gm_state *state = map_state(state_fd, count, ret);
    struct gm_memory *m;

    if (state == MAP_FAILED)
        return NULL;
    m = gm_memory_around(state, ret);
    if (!m)
        return NULL;
    m->state_fd = fcntl(state_fd, F_DUPFD_CLOEXEC, 0);
    if (m->state_fd < 0 || bind_all(m, fds, ret) < 0 || replay_messages(m, ret) < 0 ||
        finish_removals(m, ret) < 0) {
        if (m->state_fd < 0)
            gm_blame(ret, GM_KERNEL, errno, "state");
        gm_memory_free(m);
        return NULL;
    }
    forget_claims(m);
    state->version = GM_STATE_VERSION;
    return m;
}
