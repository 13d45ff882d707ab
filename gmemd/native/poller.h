/*
 * Poll before sleeping, as far as it pays.
 *
 * To wake a sleeping thread costs more than all else that happens in a fault, so a thread that has just had work looks for more a
 * while before it sleeps: once after each piece of work, so that without work nothing is spent. How often that was worth it is
 * remembered; when it hardly ever is (a network whose round trip is longer, a guest that rarely faults), it is only tried now and then.
 * Between two looks the CPU is offered to others: where there are few, who is waited for may need this one.
 */
#ifndef GM_POLLER_H
#define GM_POLLER_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/epoll.h>

struct gm_poll {
    uint64_t most_ns; /* never poll longer than this; 0 never polls */
    unsigned worth;   /* share of the latest polls that found something, of GM_POLL_ALL */
    unsigned skipped; /* polls not made since the latest */
    bool keeps_cpu;   /* while it polls: set by who knows that only something less urgent wants it */
};

enum { GM_POLL_ALL = 1024 };

void gm_poll_init(struct gm_poll *p, uint32_t most_us);

/* epoll_wait() with polling; `timeout_ms` as there. */
int gm_poll_wait(struct gm_poll *p, int epoll, struct epoll_event *events, int most, int timeout_ms);

#endif
