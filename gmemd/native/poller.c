#include "poller.h"

#include "clock.h"

/* The shortest poll worth having: about two system calls. */
enum { FIRST_NS = 4000 };

static void learn(struct gm_poll *p, uint64_t slept)
{
    if (slept > p->most_ns)
        p->now_ns = p->now_ns / 2 < FIRST_NS ? 0 : p->now_ns / 2;
    else if (p->now_ns < p->most_ns)
        p->now_ns = p->now_ns ? p->now_ns * 2 : FIRST_NS;
    if (p->now_ns > p->most_ns)
        p->now_ns = p->most_ns;
}

int gm_poll_wait(struct gm_poll *p, int epoll, struct epoll_event *events, int most, int timeout_ms)
{
    uint64_t began = gm_now_ns(), now = began;
    int n;

    do {
        n = epoll_wait(epoll, events, most, 0);
        if (n)
            return n;
        now = gm_now_ns();
    } while (now - began < p->now_ns);
    n = epoll_wait(epoll, events, most, timeout_ms);
    learn(p, gm_now_ns() - now);
    return n;
}
