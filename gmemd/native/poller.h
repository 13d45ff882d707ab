/*
 * Poll before sleeping, as far as it pays.
 *
 * To wake a sleeping thread costs more than all else that happens in a fault, so a thread that expects work soon looks for it
 * a while before it sleeps. How long is learnt as KVM learns halt_poll_ns: a sleep that was shorter than the longest poll
 * allowed would have been saved by polling, so poll longer; a longer one would not, so poll less, down to nothing.
 */
#ifndef GM_POLLER_H
#define GM_POLLER_H

#include <stdint.h>
#include <sys/epoll.h>

struct gm_poll {
    uint64_t most_ns; /* never poll longer than this; 0 never polls */
    uint64_t now_ns;  /* what was learnt */
};

/* epoll_wait() with polling; `timeout_ms` as there. */
int gm_poll_wait(struct gm_poll *p, int epoll, struct epoll_event *events, int most, int timeout_ms);

#endif
