#include "poller.h"

#include "clock.h"

#include <sched.h>

enum {
    MEMORY = 16,                   /* polls that the memory goes back, about */
    HARDLY_EVER = GM_POLL_ALL / 8, /* below this share, polling costs more than it saves */
    TRY_EVERY = 16,                /* and is still tried once in so many times, since networks and guests change */
};

void gm_poll_init(struct gm_poll *p, uint32_t most_us)
{
    *p = (struct gm_poll){.most_ns = (uint64_t)most_us * 1000, .worth = GM_POLL_ALL};
}

static int poll_now(struct gm_poll *p, int epoll, struct epoll_event *events, int most)
{
    uint64_t until = gm_now_ns() + p->most_ns;
    int n = epoll_wait(epoll, events, most, 0);

    while (!n && gm_now_ns() < until) {
        if (!p->keeps_cpu)
            sched_yield();
        n = epoll_wait(epoll, events, most, 0);
    }
    p->worth -= p->worth / MEMORY;
    if (n > 0)
        p->worth += GM_POLL_ALL / MEMORY;
    return n;
}

int gm_poll_wait(struct gm_poll *p, int epoll, struct epoll_event *events, int most, int timeout_ms)
{
    int n = epoll_wait(epoll, events, most, 0);

    if (n || !timeout_ms)
        return n;
    if (p->most_ns && (p->worth >= HARDLY_EVER || ++p->skipped >= TRY_EVERY)) {
        p->skipped = 0;
        n = poll_now(p, epoll, events, most);
        if (n)
            return n;
    }
    return epoll_wait(epoll, events, most, timeout_ms);
}
