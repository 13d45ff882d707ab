/*
 * One migration at its destination: guest memory, who waits, and what to tell the event loop.
 *
 * Three kinds of thread come here: the pager (one for all migrations), which reads faults and the urgent lane; lane threads, which
 * read the background lanes; and the event loop, which attaches, detaches and looks.
 */
#ifndef GM_DESTINATION_H
#define GM_DESTINATION_H

#include "blocked.h"
#include "histogram.h"
#include "memory.h"
#include "problem.h"
#include "release.h"
#include "trace.h"
#include "waits.h"

#include <pthread.h>
#include <stdint.h>

/* python */
struct gm_destination;

/* What gm_destination_events() tells, each once until it happens again. */
#define GM_EVENT_COMPLETE 1    /* the received bitmap is full */
#define GM_EVENT_URGENT_DOWN 2 /* the urgent lane ended; the problem says how */
#define GM_EVENT_STUCK 4       /* a page could not be put in place; the problem says why */
#define GM_EVENT_VMM_GONE 8    /* the process of the userfaultfd no longer exists */
#define GM_EVENT_VMM_BROKEN 16 /* a userfaultfd or the fault socket of the VMM cannot be read, and is read no more */

struct gm_counters {
    uint64_t faults, faults_missing, faults_minor, faults_vcpu; /* vcpu: asked by a vCPU that left KVM_RUN */
    uint64_t faults_again;                                      /* for a page that was in place already */
    uint64_t requests, urgent_pages, background_pages, zero_pages, dropped_pages;
    uint64_t removed_pages, damaged_frames;
    uint64_t urgent_bytes, background_bytes;
    uint64_t waits;
};

struct gm_destination *gm_destination_new(struct gm_memory *m, uint32_t trace_records, struct gm_problem *ret);
/* Only when neither the pager nor any lane uses it. */
void gm_destination_free(struct gm_destination *d);
/* An eventfd: readable when there are events. */
int gm_destination_event_fd(const struct gm_destination *d);
/* Takes the events, and the problem of the latest that has one. */
uint32_t gm_destination_events(struct gm_destination *d, struct gm_problem *ret);
void gm_destination_counters(const struct gm_destination *d, struct gm_counters *out);
const struct gm_histogram *gm_destination_latency(const struct gm_destination *d);
/* From an urgent frame's coming to its pages being mapped. */
const struct gm_histogram *gm_destination_installing(const struct gm_destination *d);
unsigned gm_destination_waits(struct gm_destination *d, struct gm_wait *out, unsigned most);
/* How long each thread has waited, without waits that have not ended. */
unsigned gm_destination_blocked(struct gm_destination *d, struct gm_blocked_thread *out, unsigned most);
struct gm_trace *gm_destination_trace(struct gm_destination *d);

/* vCPUs ask on this SOCK_SEQPACKET socket, and are answered on it (docs/handoff.md). Before the pager has the destination. */
void gm_destination_set_vcpus(struct gm_destination *d, int socket, uint32_t vcpus);
/* A predecessor may have taken requests that it did not live to answer: has the VMM send what is open once more. */
void gm_destination_ask_vcpus(struct gm_destination *d);

/* These pages are zero at the source: they are received, as holes. Returns how many were still missing. */
int64_t gm_destination_told_zero(struct gm_destination *d, unsigned region, uint64_t first, uint64_t count,
                                 struct gm_problem *ret);
/* The VMM took these pages out itself: they are zero from then on. */
int gm_destination_discard(struct gm_destination *d, unsigned region, uint64_t first, uint64_t count,
                           struct gm_problem *ret);
/* end python */

/* Pages to ask for that no fault asks for: from damaged frames. A lane that has more of them than this has other troubles. */
enum { GM_MAX_ASKS = 16 };

struct gm_ask {
    uint64_t first;
    uint32_t region, count;
};

struct gm_destination {
    struct gm_memory *memory;
    /* Pages of the frame in a lane's slot that the VMM took out, and that could not be cleared. Each is its lane's, and under
     * `lock` who tries it again for the lane. */
    _Atomic uint64_t unfinished[GM_MAX_LANES];
    struct gm_trail trail[GM_MAX_LANES];
    struct gm_waits waits;
    struct gm_histogram latency;    /* of faults, from the message to the page being mapped */
    struct gm_histogram installing; /* of that, what came after the page did */
    struct gm_blocked blocked;
    struct gm_trace *trace;
    /* How many are between reading events and having acted upon them; see install.c. */
    _Atomic uint64_t reading;
    /* How many lanes are giving claims back: nobody begins to read meanwhile. */
    _Atomic uint64_t giving_up;
    _Atomic uint32_t waited_us; /* how long the latest wait was that is over */
    _Atomic uint32_t events;
    int event_fd;
    _Atomic int kick_fd; /* the pager's, or -1 */
    int vcpu_socket; /* or -1 */
    uint32_t vcpus;
    _Atomic _Bool vcpus_deaf; /* there was no room for an answer: the VMM will have to ask again */
    pthread_mutex_t lock; /* of what follows */
    struct gm_ask asks[GM_MAX_ASKS];
    unsigned asked;
    struct gm_problem problem;
    struct {
        _Atomic uint64_t faults, faults_missing, faults_minor, faults_vcpu, faults_again, requests, urgent_pages, background_pages,
            zero_pages, dropped_pages, removed_pages, damaged_frames, urgent_bytes, background_bytes;
    } n;
};

#define GM_COUNT(destination, what, by)                                                                            \
    atomic_fetch_add_explicit(&(destination)->n.what, (by), memory_order_relaxed)

/* Has the pager ask for pages. */
int gm_destination_ask(struct gm_destination *d, uint32_t region, uint64_t first, uint32_t count,
                       struct gm_problem *ret);

/* Takes one of those; returns whether there was any. */
bool gm_destination_next_ask(struct gm_destination *d, struct gm_ask *out);

/* Ends all waits for received pages, records how long they were, and answers vCPUs. */
void gm_destination_end_waits(struct gm_destination *d, const struct gm_region *r, uint64_t first, uint64_t count);

/* Tells the event loop; `problem` may be NULL. */
void gm_destination_tell(struct gm_destination *d, uint32_t event, const struct gm_problem *problem);

/* Makes the pager look at the waits again. */
void gm_destination_kick(struct gm_destination *d);

#endif
