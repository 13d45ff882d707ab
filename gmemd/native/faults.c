#include "faults.h"

#include "clock.h"
#include "cuts.h"
#include "install.h"
#include "kill_point.h"
#include "uapi.h"
#include "uffd.h"
#include "vcpus.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

_Static_assert(sizeof(struct uffd_msg) == GM_MESSAGE_BYTES, "the state has room for whole messages");

/* Whether one more frame finds room. If not, everything is asked for again once all has gone. */
static bool has_room(struct gm_port *port)
{
    port->unsaid |= GM_OUT_BYTES - (port->out_end - port->out_start) < GM_HEADER_BYTES;
    return !port->unsaid;
}

void gm_faults_queue(struct gm_port *port, uint8_t kind, uint32_t region, uint64_t first, uint32_t count)
{
    struct gm_lane *lane = port->urgent;
    struct gm_frame frame = {.kind = kind, .region = (uint16_t)region, .first = first, .count = count};

    /* Without a lane nothing is queued: a new one asks for everything that is waited for. */
    if (!lane || !has_room(port))
        return;
    if (port->out_start == port->out_end)
        port->out_start = port->out_end = 0;
    if (GM_OUT_BYTES - port->out_end < GM_HEADER_BYTES) {
        memmove(port->out, port->out + port->out_start, port->out_end - port->out_start);
        port->out_end -= port->out_start;
        port->out_start = 0;
    }
    if (lane->checksum)
        frame.flags = GM_FRAME_CRC;
    if (kind == GM_KIND_REQUEST)
        frame.crc = atomic_load_explicit(&port->destination->waited_us, memory_order_relaxed);
    gm_frame_encode(&frame, port->out + port->out_end);
    port->out_end += GM_HEADER_BYTES;
}

int gm_faults_send(struct gm_port *port, struct gm_problem *ret)
{
    if (port->urgent && port->out_start < port->out_end)
        gm_stamp(port->destination->memory->stages, GM_STAGE_ASKED, 0, 0);
    while (port->urgent && port->out_start < port->out_end) {
        struct iovec rest = {port->out + port->out_start, port->out_end - port->out_start};
        ssize_t put = gm_stream_write(&port->urgent->stream, &rest, 1);

        if (put < 0)
            return gm_stream_ended(&port->urgent->stream, put, "", ret);
        if (!put)
            return 1;
        port->out_start += (size_t)put;
    }
    return 0;
}

static void request(struct gm_port *port, uint32_t region, uint64_t first, uint32_t count)
{
    gm_faults_queue(port, GM_KIND_REQUEST, region, first, count);
    GM_COUNT(port->destination, requests, 1);
}

static void continue_wait(struct gm_port *port, struct gm_region *r, uint64_t page)
{
    struct gm_destination *d = port->destination;
    struct gm_problem problem;
    int error = gm_install_continue(d, r, page);

    if (error == -EAGAIN) {
        port->again = true;
    } else if (error && error != -ENOENT && error != -ESRCH) {
        gm_blame(&problem, error == -EFAULT || error == -EINVAL ? GM_VMM : GM_KERNEL, -error,
                 "region %u: page %llu is in place and cannot be mapped", r->index, (unsigned long long)page);
        gm_destination_tell(d, GM_EVENT_STUCK, &problem);
    }
}

static void trace(struct gm_destination *d, const struct gm_wait *wait, uint64_t flags)
{
    struct gm_trace_record record = {
        .time_ns = wait->since_ns,
        .page = wait->page,
        .thread = wait->thread,
        .region = (uint16_t)wait->region,
        .flags = (uint16_t)((flags & UFFD_PAGEFAULT_FLAG_WRITE ? GM_TRACE_WRITE : 0) |
                            (flags & UFFD_PAGEFAULT_FLAG_MINOR ? GM_TRACE_MINOR : 0)),
    };

    gm_trace_write(d->trace, &record);
}

/*
 * The wait is noted before the received bit is looked at, and a lane sets the bit before it looks at the waits: whichever comes
 * second sees the other, so no thread is left asleep on a page that is there.
 */
static void begin_wait(struct gm_port *port, struct gm_region *r, const struct gm_wait *wait)
{
    struct gm_destination *d = port->destination;
    bool first = gm_waits_add(&d->waits, wait);

    if (gm_bitmap_test(r->received, wait->page)) {
        GM_COUNT(d, faults_again, 1);
        continue_wait(port, r, wait->page);
    } else if (first) {
        request(port, r->index, wait->page, 1);
    }
}

static void take_fault(struct gm_port *port, const struct uffd_msg *message, uint64_t now)
{
    struct gm_destination *d = port->destination;
    uint64_t address = message->arg.pagefault.address, flags = message->arg.pagefault.flags;
    struct gm_region *r = gm_memory_find(d->memory, address);
    struct gm_wait wait = {.since_ns = now, .thread = message->arg.pagefault.feat.ptid};
    struct gm_problem problem;

    if (!r) {
        gm_blame(&problem, GM_VMM, 0, "fault at %#llx, outside every region", (unsigned long long)address);
        gm_destination_tell(d, GM_EVENT_STUCK, &problem);
        return;
    }
    wait.region = r->index;
    wait.page = (address - r->hva) >> r->page_shift;
    gm_stamp(d->memory->stages, GM_STAGE_READ, wait.region, wait.page);
    GM_COUNT(d, faults, 1);
    if (flags & UFFD_PAGEFAULT_FLAG_MINOR)
        GM_COUNT(d, faults_minor, 1);
    else
        GM_COUNT(d, faults_missing, 1);
    if (d->trace)
        trace(d, &wait, flags);
    begin_wait(port, r, &wait);
}

int gm_faults_read_vcpus(struct gm_port *port, struct gm_problem *ret)
{
    struct gm_destination *d = port->destination;
    int taken = 0;

    for (; taken < GM_MESSAGES; taken++) {
        struct gm_wait wait = {.since_ns = gm_now_ns(), .vcpu = 1};
        struct gm_region *r;
        int got;

        if (atomic_load(&d->waits.count) == GM_MAX_WAITS) {
            port->full = true;
            break;
        }
        got = gm_vcpus_take_untrusted(d, &wait, &r, ret);
        if (got < 0)
            return -1;
        if (!got)
            break;
        gm_stamp(d->memory->stages, GM_STAGE_READ, wait.region, wait.page);
        GM_COUNT(d, faults, 1);
        GM_COUNT(d, faults_vcpu, 1);
        if (d->trace)
            trace(d, &wait, 0);
        begin_wait(port, r, &wait);
    }
    return taken;
}

static void take_removal(struct gm_port *port, const struct uffd_msg *message)
{
    struct gm_memory *m = port->destination->memory;
    uint64_t start = message->arg.remove.start, end = message->arg.remove.end;
    struct gm_problem problem;

    for (unsigned i = 0; i < m->count; i++) {
        struct gm_region *r = &m->region[i];
        uint64_t first, count = gm_region_clip(r, start, end, &first);

        if (count)
            gm_install_removed(port->destination, r, first, count);
        if (gm_cuts_note(m, r, start, end, &problem) < 0)
            gm_destination_tell(port->destination, GM_EVENT_STUCK, &problem);
    }
}

/* Once they are acted upon, a successor must not find them. */
static void forget_messages(struct uffd_msg *messages, int count)
{
    for (int i = 0; i < count; i++)
        messages[i].event = 0;
}

static bool take_event(struct gm_port *port, const struct uffd_msg *message)
{
    switch (message->event) {
    case UFFD_EVENT_REMOVE:
    case UFFD_EVENT_UNMAP:
        take_removal(port, message);
        return true;
    case UFFD_EVENT_FORK:
        /* The child's memory is not the guest's; and nobody else would close its descriptor. */
        close((int)message->arg.fork.ufd);
        return false;
    default:
        return false;
    }
}

int gm_faults_read(struct gm_port *port, int uffd, struct gm_problem *ret)
{
    struct gm_destination *d = port->destination;
    unsigned room = GM_MAX_WAITS - atomic_load(&d->waits.count);
    struct uffd_msg messages[GM_MESSAGES];
    struct uffd_msg *kept = d->memory->messages;
    bool removed = false;
    uint64_t now;
    int n;

    if (!room) {
        port->full = true;
        if (!port->again)
            return 0;
        /* Behind faults that nobody has read may lie the event that holds up every CONTINUE, and with it all that waits. */
        room = GM_MESSAGES;
    }
    gm_install_events_begin(d);
    n = gm_uffd_read(uffd, kept, room < GM_MESSAGES ? room : GM_MESSAGES);
    for (int i = 0; i < n; i++) {
        messages[i] = kept[i];
        if (kept[i].event == UFFD_EVENT_REMOVE)
            gm_kill_point("removal-read", 0);
        removed |= take_event(port, &messages[i]);
    }
    forget_messages(kept, n);
    gm_install_events_end(d);
    if (n < 0)
        return gm_blame(ret, GM_VMM, -n, "userfaultfd %d", uffd);
    now = gm_now_ns();
    for (int i = 0; i < n; i++) {
        if (messages[i].event != UFFD_EVENT_PAGEFAULT)
            continue;
        if (atomic_load(&d->waits.count) < GM_MAX_WAITS)
            take_fault(port, &messages[i], now);
        else
            port->missed = true;
    }
    if (removed)
        gm_faults_sweep(port);
    return n;
}

/* Calls `act` for a copy of every wait, so that `act` may end waits. */
static void each_wait(struct gm_port *port, void (*act)(struct gm_port *, struct gm_region *, uint64_t))
{
    struct gm_destination *d = port->destination;
    struct gm_wait list[GM_MAX_WAITS];
    unsigned n = gm_waits_list(&d->waits, list, GM_MAX_WAITS);

    for (unsigned i = 0; i < n; i++)
        act(port, &d->memory->region[list[i].region], list[i].page);
}

static void sweep_one(struct gm_port *port, struct gm_region *r, uint64_t page)
{
    if (gm_bitmap_test(r->received, page))
        continue_wait(port, r, page);
}

static void ask_one(struct gm_port *port, struct gm_region *r, uint64_t page)
{
    if (!gm_bitmap_test(r->received, page))
        request(port, r->index, page, 1);
}

void gm_faults_sweep(struct gm_port *port)
{
    port->again = false;
    if (gm_waits_any(&port->destination->waits))
        each_wait(port, sweep_one);
}

void gm_faults_ask_all(struct gm_port *port)
{
    each_wait(port, ask_one);
}

void gm_faults_ask_damaged(struct gm_port *port)
{
    struct gm_ask ask;

    while (port->urgent && has_room(port) && gm_destination_next_ask(port->destination, &ask))
        request(port, ask.region, ask.first, ask.count);
}
