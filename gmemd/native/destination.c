#include "destination.h"

#include "cleanup.h"
#include "clock.h"
#include "install.h"
#include "kill_point.h"
#include "memfile.h"
#include "release.h"
#include "vcpus.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct gm_destination *gm_destination_new(struct gm_memory *m, uint32_t trace_records, struct gm_problem *ret)
{
    struct gm_destination *d = calloc(1, sizeof *d);

    if (!d) {
        gm_blame(ret, GM_KERNEL, ENOMEM, "destination");
        return NULL;
    }
    d->memory = m;
    d->kick_fd = -1;
    d->vcpu_socket = -1;
    gm_waits_init(&d->waits);
    gm_blocked_init(&d->blocked);
    pthread_mutex_init(&d->lock, NULL);
    d->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    d->trace = trace_records ? gm_trace_new(trace_records) : NULL;
    if (d->event_fd < 0 || (trace_records && !d->trace)) {
        gm_blame(ret, GM_KERNEL, errno, "destination");
        gm_destination_free(d);
        return NULL;
    }
    return d;
}

void gm_destination_free(struct gm_destination *d)
{
    if (!d)
        return;
    if (d->event_fd >= 0)
        close(d->event_fd);
    gm_trace_free(d->trace);
    gm_waits_deinit(&d->waits);
    gm_blocked_deinit(&d->blocked);
    pthread_mutex_destroy(&d->lock);
    free(d);
}

int gm_destination_event_fd(const struct gm_destination *d)
{
    return d->event_fd;
}

static void signal_fd(int fd)
{
    uint64_t one = 1;

    /* Full only after 2^64 - 2 unread signals: readable all the same. */
    if (fd >= 0 && write(fd, &one, sizeof one) < 0)
        return;
}

void gm_destination_tell(struct gm_destination *d, uint32_t event, const struct gm_problem *problem)
{
    if (problem) {
        GM_LOCKED(&d->lock);
        d->problem = *problem;
    }
    if (!(atomic_fetch_or(&d->events, event) & event))
        signal_fd(d->event_fd);
}

void gm_destination_kick(struct gm_destination *d)
{
    signal_fd(d->kick_fd);
}

int gm_destination_ask(struct gm_destination *d, uint32_t region, uint64_t first, uint32_t count,
                       struct gm_problem *ret)
{
    GM_LOCKED(&d->lock);

    if (d->asked == GM_MAX_ASKS)
        return gm_blame(ret, GM_LINK, 0, "more than %d damaged frames at a time", GM_MAX_ASKS);
    d->asks[d->asked++] = (struct gm_ask){first, region, count};
    gm_destination_kick(d);
    return 0;
}

bool gm_destination_next_ask(struct gm_destination *d, struct gm_ask *out)
{
    GM_LOCKED(&d->lock);

    if (!d->asked)
        return false;
    *out = d->asks[--d->asked];
    return true;
}

uint32_t gm_destination_events(struct gm_destination *d, struct gm_problem *ret)
{
    GM_LOCKED(&d->lock);
    uint64_t signals;

    if (read(d->event_fd, &signals, sizeof signals) < 0)
        signals = 0;
    *ret = d->problem;
    return atomic_exchange(&d->events, 0);
}

void gm_destination_counters(const struct gm_destination *d, struct gm_counters *out)
{
    *out = (struct gm_counters){
        .faults = d->n.faults,
        .faults_missing = d->n.faults_missing,
        .faults_minor = d->n.faults_minor,
        .faults_vcpu = d->n.faults_vcpu,
        .faults_again = d->n.faults_again,
        .requests = d->n.requests,
        .urgent_pages = d->n.urgent_pages,
        .background_pages = d->n.background_pages,
        .zero_pages = d->n.zero_pages,
        .dropped_pages = d->n.dropped_pages,
        .removed_pages = d->n.removed_pages,
        .damaged_frames = d->n.damaged_frames,
        .urgent_bytes = d->n.urgent_bytes,
        .background_bytes = d->n.background_bytes,
        .waits = d->waits.count,
    };
}

const struct gm_histogram *gm_destination_latency(const struct gm_destination *d)
{
    return &d->latency;
}

const struct gm_histogram *gm_destination_installing(const struct gm_destination *d)
{
    return &d->installing;
}

unsigned gm_destination_waits(struct gm_destination *d, struct gm_wait *out, unsigned most)
{
    return gm_waits_list(&d->waits, out, most);
}

unsigned gm_destination_blocked(struct gm_destination *d, struct gm_blocked_thread *out, unsigned most)
{
    return gm_blocked_list(&d->blocked, out, most);
}

struct gm_trace *gm_destination_trace(struct gm_destination *d)
{
    return d->trace;
}

void gm_destination_end_waits(struct gm_destination *d, const struct gm_region *r, uint64_t first, uint64_t count)
{
    struct gm_wait wait;

    while (gm_waits_take(&d->waits, r->index, first, count, &wait)) {
        uint64_t now = gm_now_ns();

        gm_stamp(d->memory->stages, GM_STAGE_CONTINUED, wait.region, wait.page);
        gm_histogram_record(&d->latency, now - wait.since_ns);
        atomic_store_explicit(&d->waited_us, (uint32_t)((now - wait.since_ns) / 1000), memory_order_relaxed);
        gm_blocked_add(&d->blocked, &wait, now);
        if (wait.vcpu)
            gm_vcpus_answer(d, r, &wait);
    }
}

void gm_destination_set_vcpus(struct gm_destination *d, int socket, uint32_t vcpus)
{
    d->vcpu_socket = socket;
    d->vcpus = vcpus;
}

void gm_destination_ask_vcpus(struct gm_destination *d)
{
    if (d->vcpu_socket >= 0)
        gm_vcpus_ask_again(d);
}

int64_t gm_destination_told_zero(struct gm_destination *d, unsigned region, uint64_t first, uint64_t count,
                                 struct gm_problem *ret)
{
    struct gm_region *r = &d->memory->region[region];
    uint64_t end = first + count, pages = 0;
    int failed = 0;

    for (uint64_t page = first; !failed && page < end; page += GM_FRAME_PAGES) {
        unsigned here = end - page < GM_FRAME_PAGES ? (unsigned)(end - page) : GM_FRAME_PAGES;

        failed = gm_install_hole(d, r, page, here, &pages, ret);
    }
    GM_COUNT(d, zero_pages, pages);
    if (pages)
        gm_release(d->memory, r, first, count);
    gm_install_count(d, pages);
    if (gm_waits_any(&d->waits))
        gm_destination_kick(d);
    return failed ? -1 : (int64_t)pages;
}

int gm_destination_discard(struct gm_destination *d, unsigned region, uint64_t first, uint64_t count,
                           struct gm_problem *ret)
{
    struct gm_region *r = &d->memory->region[region];
    int error;

    gm_install_events_begin(d);
    gm_install_removed(d, r, first, count);
    gm_install_events_end(d);
    error = gm_memfile_punch(r->fd, gm_file_offset(r, first), gm_bytes(r, count));
    gm_destination_kick(d);
    gm_kill_point("discarded", 0);
    if (error)
        return gm_blame(ret, GM_KERNEL, -error, "region %u: discard of %llu pages from page %llu", region,
                        (unsigned long long)count, (unsigned long long)first);
    return 0;
}
