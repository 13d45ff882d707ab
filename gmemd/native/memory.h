/*
 * Guest memory: a list of regions, and what is known of every page.
 *
 * All that a restarted daemon needs lies in one memfd, the state: which regions there are, which pages are claimed, which are
 * received, and which frame each lane is in the middle of. docs/state.md gives its layout.
 */
#ifndef GM_MEMORY_H
#define GM_MEMORY_H

#include "bitmap.h"
#include "problem.h"
#include "stages.h"

#include <stdint.h>

/* python */
#define GM_MAX_REGIONS 1024
/* A frame carries at most 64 pages, so that what is to be known of each fits one word. */
#define GM_FRAME_PAGES 64
/* Lanes of one migration at a time: urgent, and background. */
#define GM_MAX_LANES 16
#define GM_ID_BYTES 64
/* Pages of 2 MiB are the largest that a lane buffers whole. */
#define GM_MAX_PAGE_SHIFT 21

enum gm_populate {
    GM_POPULATE_NONE,
    GM_POPULATE_WRITE,
    GM_POPULATE_RECV,
    GM_POPULATE_COPY,
};

enum gm_bitmap_name {
    GM_CLAIMED,
    GM_RECEIVED,
};

struct gm_region_spec {
    int fd;   /* the memory file; stays the caller's */
    int uffd; /* the userfaultfd that covers it, or -1 at a source */
    int bitmap; /* a memfd with the userfault bitmap of its slot, or -1 */
    uint32_t file_name, uffd_name, bitmap_name; /* which of the VMM's descriptors these are, for a successor */
    uint32_t page_shift;
    uint64_t offset, pages, gpa, hva;
    uint64_t bitmap_offset; /* bytes into that memfd, a multiple of 8 */
};

struct gm_memory;

struct gm_memory *gm_memory_new(const char *migration, const struct gm_region_spec *specs, unsigned count,
                                struct gm_problem *ret);
/*
 * Takes over the memory of a daemon that has ended, from its state. `fds` are the VMM's descriptors in their first order; they and
 * `state_fd` stay the caller's. Nothing is touched unless all of the state makes sense.
 */
struct gm_memory *gm_memory_adopt(int state_fd, const int *fds, unsigned count, struct gm_problem *ret);
void gm_memory_free(struct gm_memory *m);

/* Numbers that outlive a daemon. */
enum gm_note {
    GM_NOTE_EPOCH,      /* of the latest session */
    GM_NOTE_SWITCHED,   /* 1: the guest has left its source; 2: and the VMM here knows */
    GM_NOTE_RECOVERIES, /* sessions after the first */
    GM_NOTE_TRAP,       /* GM_UFFD_ modes of the registration, 0 if there was none yet */
    GM_NOTE_VCPUS,      /* how many may ask on the VMM's fault socket, 0 without one */
    GM_NOTE_FAULTS,     /* which of the VMM's descriptors that socket is */
    GM_NOTES,
};
uint64_t gm_memory_note(const struct gm_memory *m, int note);
void gm_memory_set_note(struct gm_memory *m, int note, uint64_t value);
const char *gm_memory_migration(const struct gm_memory *m);
unsigned gm_memory_regions(const struct gm_memory *m);
/* What is known of a region; the descriptors are those of this process. */
void gm_memory_region(const struct gm_memory *m, unsigned region, struct gm_region_spec *out, int *populate);

int gm_memory_state_fd(const struct gm_memory *m);
uint64_t gm_memory_pages(const struct gm_memory *m);
uint64_t gm_memory_received(const struct gm_memory *m);

/* How pages of a region get their content; maps the alias where the way needs one. */
int gm_memory_set_populate(struct gm_memory *m, unsigned region, int populate, struct gm_problem *ret);

/* Maps a region's alias: for a file that cannot be read otherwise. */
int gm_memory_map(struct gm_memory *m, unsigned region, struct gm_problem *ret);

/* Registers every region; returns the GM_UFFD_ modes that all of them have. */
int gm_memory_register(struct gm_memory *m, struct gm_problem *ret);
/* When nothing is missing any more: no thread of the VMM waits for us afterwards, even if nobody ever reads its userfaultfds again. 1: one
 * is on its way into or out of an event, and this is to be called again. */
int gm_memory_unregister(struct gm_memory *m, struct gm_problem *ret);
/* Makes every waiting thread fault again: what a message's reader does not live to answer is asked anew. */
int gm_memory_wake(struct gm_memory *m, struct gm_problem *ret);

/*
 * The runs of set bits of one bitmap, as pairs (first page, pages), from *from on, which is moved past what was looked at. Returns the
 * number of pairs, `most` at the most; fewer means that the end was reached.
 */
unsigned gm_memory_runs(const struct gm_memory *m, unsigned region, int bitmap, uint64_t *from, uint64_t *pairs,
                        unsigned most);

/* From now on the stages of faults are stamped; before the memory is given to any thread. */
int gm_memory_time_stages(struct gm_memory *m, struct gm_problem *ret);
/* Copies the stamps out, oldest first; returns how many. */
unsigned gm_memory_stages(struct gm_memory *m, struct gm_stamp *out, unsigned most);
/* end python */

/* The frame that a lane is installing: one word, so that it is seen whole; 0 is none. */
struct gm_inflight {
    _Atomic uint64_t span;
    gm_word removed; /* pages of it that the VMM took out meanwhile */
};

/* Parts of huge pages that were taken out before these came. A VMM has no reason for any: what it gets back is a whole page. */
enum { GM_CUTS = 32 };

/* Messages of a userfaultfd (struct uffd_msg) that are read at once: enough to take all that many vCPUs send. */
enum { GM_MESSAGES = 64, GM_MESSAGE_BYTES = 32 };

/*
 * The state's layout is part of the interface between versions of gmemd: fields stay where they are, and later versions take theirs from
 * `reserved`, which is zero.
 */
struct gm_state_region {
    uint64_t offset, pages, gpa, hva;
    uint32_t page_shift, file_name, uffd_name, populate;
    uint64_t claimed_at, received_at; /* where in the state its bitmaps begin */
    uint32_t has_bitmap, bitmap_name;
    uint64_t bitmap_offset;
    uint64_t reserved[6];
};

struct gm_state {
    char magic[8]; /* "GMSTATE" */
    uint32_t version, regions;
    uint64_t size;
    char migration[GM_ID_BYTES];
    _Atomic uint64_t note[GM_NOTES];
    uint64_t reserved[63 - GM_NOTES - GM_CUTS];
    _Atomic uint64_t cut[GM_CUTS]; /* cuts.c */
    uint64_t messages_at; /* where in the state messages are read to; 0 in version 1, which has no such place */
    struct gm_inflight inflight[GM_MAX_LANES];
    struct gm_state_region region[];
};

struct gm_region {
    unsigned index;
    int fd, uffd;
    enum gm_populate populate;
    uint32_t page_shift;
    uint64_t offset, pages, gpa, hva;
    gm_word *claimed, *received;
    unsigned char *_Atomic alias;
    unsigned char *_Atomic singles; /* brings in one page at a time, where write() would a large folio; or NULL */
    gm_word *userfault; /* KVM userfault: a set bit makes a vCPU ask; NULL without */
    void *userfault_map;
    size_t userfault_size;
    _Atomic _Bool soiled; /* a populate failed half-way somewhere */
};

struct gm_memory {
    struct gm_state *state;
    int state_fd;
    unsigned count;
    uint64_t pages;
    _Atomic uint64_t received;
    struct gm_stages *stages; /* or NULL */
    struct gm_digests *_Atomic digests; /* or NULL (digest.h) */
    void *messages; /* in the state, so that what was read and not acted upon outlives us */
    void *own_messages; /* for a state without a place for them */
    struct gm_region region[];
};

static inline uint64_t gm_bytes(const struct gm_region *r, uint64_t pages)
{
    return pages << r->page_shift;
}

/* Pages of a region that a frame carries at most. Lanes have room for no more. */
static inline unsigned gm_frame_pages(const struct gm_region *r)
{
    return r->page_shift > 12 ? 1 : GM_FRAME_PAGES;
}

static inline uint64_t gm_file_offset(const struct gm_region *r, uint64_t page)
{
    return r->offset + gm_bytes(r, page);
}

/* The region that covers an address of the VMM, or of the guest; NULL if none does. */
struct gm_region *gm_memory_find(struct gm_memory *m, uint64_t hva);
struct gm_region *gm_memory_find_guest(struct gm_memory *m, uint64_t gpa);

/* The pages of the region that lie in [start, end), addresses of the VMM: returns how many, from *first on. A page of which only a part
 * does is none: a huge page that the VMM has cut into keeps what else it holds. */
uint64_t gm_region_clip(const struct gm_region *r, uint64_t start, uint64_t end, uint64_t *first);

int gm_region_map_alias(struct gm_region *r, struct gm_problem *ret);

/* The mappings that its way to populate needs. */
int gm_region_map(struct gm_region *r, struct gm_problem *ret);

/* Reads bytes of a region, by its alias if it has one. 0 or -errno: nobody dies of a file that was cut short. */
int gm_region_read(const struct gm_region *r, uint64_t at, size_t length, void *to);

#endif
