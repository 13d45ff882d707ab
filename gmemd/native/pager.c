/*
 * One epoll set holds the userfaultfds and urgent lanes of all migrations, and an eventfd to interrupt the sleep. The lock is held
 * whenever the pager is not waiting, so the event loop changes what the pager works on only between two rounds; and it says that it
 * wants the lock first, since a pager that polls would take it again before a sleeper wakes.
 */
#include "pager.h"

#include "cleanup.h"
#include "faults.h"
#include "install.h"
#include "poller.h"
#include "precedence.h"
#include "vcpus.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum {
    EVENTS = 64,        /* a round takes this many descriptors; the rest come with the next */
    LANE_BUDGET_US = 500, /* then others are looked at, too */
    AGAIN_MS = 1,       /* when an event blocks a CONTINUE and no message of it comes */
};

enum watch { WATCH_KICK, WATCH_URGENT, WATCH_UFFD, WATCH_VCPUS };

struct gm_pager {
    int epoll, kick;
    _Atomic bool stop;
    _Atomic unsigned wanted;
    _Atomic uint64_t turns;
    pthread_mutex_t lock;
    struct gm_port *ports;
    uint64_t next_id;
    struct gm_poll idle, waiting; /* with nobody waiting for an answer, and with somebody */
};

/* What some port has after a round. */
struct outlook {
    bool waiting; /* somebody who waits for an answer */
    bool busy;    /* more on its urgent lane */
    bool again;   /* something to be tried again */
};

/* What an epoll event is about: the port's id, which is never used again, so an event of a port that is gone finds none. */
static uint64_t tag(enum watch watch, uint64_t id, unsigned region)
{
    return (uint64_t)watch | (uint64_t)region << 2 | id << 20;
}

struct gm_pager *gm_pager_new(uint32_t poll_us, struct gm_problem *ret)
{
    struct gm_pager *p = calloc(1, sizeof *p);
    struct epoll_event kick = {.events = EPOLLIN, .data.u64 = WATCH_KICK};

    if (!p) {
        gm_blame(ret, GM_KERNEL, ENOMEM, "pager");
        return NULL;
    }
    pthread_mutex_init(&p->lock, NULL);
    gm_poll_init(&p->idle, poll_us);
    gm_poll_init(&p->waiting, poll_us);
    p->next_id = 1;
    p->epoll = epoll_create1(EPOLL_CLOEXEC);
    p->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (p->epoll < 0 || p->kick < 0 || epoll_ctl(p->epoll, EPOLL_CTL_ADD, p->kick, &kick) < 0) {
        gm_blame(ret, GM_KERNEL, errno, "pager");
        gm_pager_free(p);
        return NULL;
    }
    return p;
}

void gm_pager_free(struct gm_pager *p)
{
    if (!p)
        return;
    if (p->epoll >= 0)
        close(p->epoll);
    if (p->kick >= 0)
        close(p->kick);
    pthread_mutex_destroy(&p->lock);
    free(p);
}

static void kick(struct gm_pager *p)
{
    uint64_t one = 1;

    if (write(p->kick, &one, sizeof one) < 0)
        return;
}

/* The event loop takes the lock through here. */
static pthread_mutex_t *interrupt(struct gm_pager *p)
{
    atomic_fetch_add(&p->wanted, 1);
    kick(p);
    pthread_mutex_lock(&p->lock);
    atomic_fetch_sub(&p->wanted, 1);
    return &p->lock;
}

#define INTERRUPTED(pager) __attribute__((cleanup(gm_unlock), unused)) pthread_mutex_t *held = interrupt(pager)

static struct gm_port *port_of(struct gm_pager *p, const struct gm_destination *d)
{
    struct gm_port *port = p->ports;

    while (port && port->destination != d)
        port = port->next;
    return port;
}

static bool first_of_its_uffd(const struct gm_memory *m, unsigned region)
{
    for (unsigned i = 0; i < region; i++)
        if (m->region[i].uffd == m->region[region].uffd)
            return false;
    return true;
}

/* A VMM that leaves no room for answers is not listened to. That there is room is said once: the host may still lack memory for an answer. */
static int watch_vcpus(struct gm_pager *p, const struct gm_port *port, int operation)
{
    struct epoll_event event = {
        .events = port->deaf ? EPOLLOUT | (uint32_t)EPOLLET : EPOLLIN,
        .data.u64 = tag(WATCH_VCPUS, port->id, 0),
    };

    return epoll_ctl(p->epoll, operation, port->destination->vcpu_socket, &event);
}

/* Adds, or with EPOLL_CTL_DEL takes away, all that faults of the port come from. To add what is there already is no failure. */
static int watch_faults(struct gm_pager *p, const struct gm_port *port, int operation)
{
    const struct gm_memory *m = port->destination->memory;

    if (port->destination->vcpu_socket >= 0 && watch_vcpus(p, port, operation) < 0 && operation == EPOLL_CTL_ADD &&
        errno != EEXIST)
        return -1;
    for (unsigned i = 0; i < m->count; i++) {
        struct epoll_event event = {.events = EPOLLIN, .data.u64 = tag(WATCH_UFFD, port->id, i)};

        if (first_of_its_uffd(m, i) && epoll_ctl(p->epoll, operation, m->region[i].uffd, &event) < 0 &&
            operation == EPOLL_CTL_ADD && errno != EEXIST)
            return -1;
    }
    return 0;
}

static int watch_urgent(struct gm_pager *p, const struct gm_port *port, int operation, bool writable)
{
    struct epoll_event event = {
        .events = EPOLLIN | (writable ? (uint32_t)EPOLLOUT : 0),
        .data.u64 = tag(WATCH_URGENT, port->id, 0),
    };

    return epoll_ctl(p->epoll, operation, port->urgent->stream.socket, &event);
}

static void drop_urgent(struct gm_pager *p, struct gm_port *port)
{
    if (port->urgent)
        watch_urgent(p, port, EPOLL_CTL_DEL, false);
    port->urgent = NULL;
    port->busy = port->unsaid = false;
    port->out_start = port->out_end = 0;
}

int gm_pager_add(struct gm_pager *p, struct gm_destination *d, struct gm_problem *ret)
{
    INTERRUPTED(p);
    struct gm_port *port = calloc(1, sizeof *port);

    if (!port)
        return gm_blame(ret, GM_KERNEL, ENOMEM, "pager: another migration");
    port->destination = d;
    port->id = p->next_id++;
    if (watch_faults(p, port, EPOLL_CTL_ADD) < 0) {
        int error = errno;

        watch_faults(p, port, EPOLL_CTL_DEL);
        free(port);
        return gm_blame(ret, GM_VMM, error, "userfaultfd cannot be watched");
    }
    port->next = p->ports;
    p->ports = port;
    d->kick_fd = p->kick;
    return 0;
}

void gm_pager_remove(struct gm_pager *p, struct gm_destination *d)
{
    INTERRUPTED(p);
    struct gm_port **link = &p->ports;
    struct gm_port *port;

    while (*link && (*link)->destination != d)
        link = &(*link)->next;
    port = *link;
    if (!port)
        return;
    *link = port->next;
    drop_urgent(p, port);
    watch_faults(p, port, EPOLL_CTL_DEL);
    d->kick_fd = -1;
    free(port);
}

static void urgent_ended(struct gm_pager *p, struct gm_port *port, const struct gm_problem *problem)
{
    drop_urgent(p, port);
    gm_destination_tell(port->destination, GM_EVENT_URGENT_DOWN, problem);
}

static void send_requests(struct gm_pager *p, struct gm_port *port)
{
    struct gm_problem problem;
    int left = gm_faults_send(port, &problem);

    if (left < 0)
        urgent_ended(p, port, &problem);
    else if (left && port->urgent)
        watch_urgent(p, port, EPOLL_CTL_MOD, true);
}

int gm_pager_urgent(struct gm_pager *p, struct gm_destination *d, struct gm_lane *lane, struct gm_problem *ret)
{
    INTERRUPTED(p);
    struct gm_port *port = port_of(p, d);

    if (!port)
        return gm_blame(ret, GM_KERNEL, ENOENT, "pager: urgent lane for a migration that it does not know");
    drop_urgent(p, port);
    port->urgent = lane;
    if (!lane)
        return 0;
    if (watch_urgent(p, port, EPOLL_CTL_ADD, false) < 0) {
        port->urgent = NULL;
        return gm_blame(ret, GM_KERNEL, errno, "urgent lane cannot be watched");
    }
    port->busy = true; /* who shook hands on it may have read ahead */
    gm_faults_ask_all(port);
    gm_faults_ask_damaged(port);
    send_requests(p, port);
    return 0;
}

void gm_pager_beat(struct gm_pager *p, struct gm_destination *d)
{
    INTERRUPTED(p);
    struct gm_port *port = port_of(p, d);

    if (port && port->urgent && port->out_start == port->out_end) {
        gm_faults_queue(port, GM_KIND_BEAT, 0, 0, 0);
        send_requests(p, port);
    }
}

/* Has the VMM ask again for what it was not told. */
static void ask_vcpus(struct gm_pager *p, struct gm_port *port)
{
    port->deaf = !gm_vcpus_ask_again(port->destination);
    if (!port->deaf)
        watch_vcpus(p, port, EPOLL_CTL_MOD);
}

void gm_pager_ask(struct gm_pager *p, struct gm_destination *d)
{
    INTERRUPTED(p);
    struct gm_port *port = port_of(p, d);

    gm_install_retry(d);
    if (port && port->urgent)
        port->unsaid = true;
    if (port && port->deaf)
        ask_vcpus(p, port);
}

static void read_urgent(struct gm_pager *p, struct gm_port *port)
{
    struct gm_problem problem;
    int state = gm_lane_receive(port->urgent, LANE_BUDGET_US, &problem);

    port->busy = state == GM_LANE_BUSY;
    if (state < 0)
        urgent_ended(p, port, &problem);
}

/* Returns whether there was any. */
static bool read_faults(struct gm_pager *p, struct gm_port *port, unsigned region)
{
    struct gm_problem problem;
    int uffd = port->destination->memory->region[region].uffd;
    int n = gm_faults_read(port, uffd, &problem);

    if (n < 0) {
        epoll_ctl(p->epoll, EPOLL_CTL_DEL, uffd, NULL);
        gm_destination_tell(port->destination, GM_EVENT_VMM_BROKEN, &problem);
    } else if (port->full) {
        watch_faults(p, port, EPOLL_CTL_DEL);
    }
    return n > 0;
}

static void read_vcpus(struct gm_pager *p, struct gm_port *port)
{
    struct gm_problem problem;

    if (port->deaf) {
        ask_vcpus(p, port);
        return;
    }
    if (gm_faults_read_vcpus(port, &problem) < 0) {
        epoll_ctl(p->epoll, EPOLL_CTL_DEL, port->destination->vcpu_socket, NULL);
        gm_destination_tell(port->destination, GM_EVENT_VMM_BROKEN, &problem);
    } else if (port->full) {
        watch_faults(p, port, EPOLL_CTL_DEL);
    }
}

static void take(struct gm_pager *p, const struct epoll_event *event)
{
    uint64_t what = event->data.u64;
    struct gm_port *port = p->ports;
    uint64_t signals;

    while (port && port->id != what >> 20)
        port = port->next;
    if ((what & 3) == WATCH_KICK) {
        if (read(p->kick, &signals, sizeof signals) < 0)
            return;
        for (port = p->ports; port; port = port->next) {
            gm_faults_sweep(port);
            gm_faults_ask_damaged(port);
        }
    } else if (port && (what & 3) == WATCH_URGENT && port->urgent) {
        if (event->events & EPOLLOUT)
            watch_urgent(p, port, EPOLL_CTL_MOD, false);
        read_urgent(p, port);
    } else if (port && (what & 3) == WATCH_UFFD) {
        read_faults(p, port, (unsigned)(what >> 2 & 0x3ffff));
    } else if (port && (what & 3) == WATCH_VCPUS) {
        read_vcpus(p, port);
    }
}

/* A port with all the waits that there can be: what it does with the userfaultfds that are not watched. */
static void settle_full(struct gm_pager *p, struct gm_port *port)
{
    struct gm_memory *m = port->destination->memory;
    struct gm_problem problem;

    for (unsigned i = 0; port->again && i < m->count; i++)
        while (first_of_its_uffd(m, i) && read_faults(p, port, i))
            ;
    if (atomic_load(&port->destination->waits.count) >= GM_MAX_WAITS / 2)
        return;
    if (watch_faults(p, port, EPOLL_CTL_ADD) < 0) {
        gm_blame(&problem, GM_KERNEL, errno, "userfaultfd cannot be watched again");
        gm_destination_tell(port->destination, GM_EVENT_STUCK, &problem);
        return;
    }
    port->full = false;
    if (port->missed && gm_memory_wake(m, &problem) < 0)
        gm_destination_tell(port->destination, GM_EVENT_STUCK, &problem);
    port->missed = false;
}

/* What every port needs after a round. Fills in what the next sleep depends on. */
static void settle(struct gm_pager *p, struct outlook *next)
{
    *next = (struct outlook){0};
    for (struct gm_port *port = p->ports; port; port = port->next) {
        if (port->again)
            gm_faults_sweep(port);
        if (port->full)
            settle_full(p, port);
        if (atomic_load(&port->destination->vcpus_deaf) && !port->deaf) {
            port->deaf = true;
            watch_vcpus(p, port, EPOLL_CTL_MOD);
        }
        send_requests(p, port);
        if (port->unsaid && port->out_start == port->out_end) {
            port->unsaid = false;
            gm_faults_ask_all(port);
            gm_faults_ask_damaged(port);
            send_requests(p, port);
        }
        next->busy |= port->busy;
        next->again |= port->again;
        next->waiting |= gm_waits_any(&port->destination->waits);
    }
}

static int wait_for_work(struct gm_pager *p, const struct outlook *next, struct epoll_event *events)
{
    int timeout_ms = next->busy ? 0 : next->again ? AGAIN_MS : -1;

    return gm_poll_wait(next->waiting ? &p->waiting : &p->idle, p->epoll, events, EVENTS, timeout_ms);
}

int gm_pager_run(struct gm_pager *p, struct gm_problem *ret)
{
    GM_GOES_FIRST;
    struct epoll_event events[EVENTS];
    struct outlook next = {0};

    while (!atomic_load(&p->stop)) {
        int n = wait_for_work(p, &next, events);

        if (n < 0 && errno != EINTR)
            return gm_blame(ret, GM_KERNEL, errno, "pager");
        while (atomic_load(&p->wanted))
            sched_yield();
        GM_LOCKED(&p->lock);
        for (struct gm_port *port = p->ports; port; port = port->next)
            if (port->busy)
                read_urgent(p, port);
        for (int i = 0; i < n; i++)
            take(p, &events[i]);
        settle(p, &next);
        atomic_fetch_add_explicit(&p->turns, 1, memory_order_relaxed);
    }
    return 0;
}

uint64_t gm_pager_turns(const struct gm_pager *p)
{
    return atomic_load_explicit(&p->turns, memory_order_relaxed);
}

void gm_pager_turn(struct gm_pager *p)
{
    kick(p);
}

void gm_pager_stop(struct gm_pager *p)
{
    atomic_store(&p->stop, true);
    kick(p);
}
