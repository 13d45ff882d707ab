/*
 * The background gives way to faults: how fast it may go follows how long pages are waited for.
 *
 * The destination says with each request how long the page before was waited for. That is held against what the way there and back
 * takes without us. A host that is busy makes waits long, too, and a slower background would not help: it is the background's own packets
 * that tell whether they stand in a queue. While they do, and many waits are longer than they need be, the background gets slower by a
 * quarter, down to a quarter of what the line carries: that leaves no queue of ours, and what is late then, is late for other reasons, as
 * behind a proxy, whose far side the kernel does not see. When they are not, it gets faster, by more each time; and when nobody waits, it
 * goes as fast as it can.
 */
#ifndef GM_GIVEWAY_H
#define GM_GIVEWAY_H

#include <stdint.h>

struct gm_giveway {
    _Atomic uint64_t rate;     /* bytes a second, 0 for no limit */
    _Atomic uint64_t heard_ns; /* when somebody last waited */
    _Atomic uint32_t queue_us; /* that the background's packets stand in */
    uint64_t since_ns, sent;   /* when this turn began, and what had been sent then */
    uint64_t carried;          /* bytes a second that the line carries, as far as was seen */
    unsigned waits, late;      /* in this turn */
    unsigned calm;             /* turns without many late ones, up to now */
    unsigned fell_short;       /* turns in which the line, and not we, kept it slow, up to now */
};

/* The background's packets take so much longer than they need to. */
void gm_giveway_queue(struct gm_giveway *g, uint32_t queue_us);

/* A page was waited for so long, over a way that takes `round_trip_us`; `sent` bytes have gone so far. One thread calls this. */
void gm_giveway_wait(struct gm_giveway *g, uint64_t now_ns, uint32_t waited_us, uint32_t round_trip_us, uint64_t sent);

/* Bytes a second that the background may send now, 0 for no limit. */
uint64_t gm_giveway_rate(const struct gm_giveway *g, uint64_t now_ns);

#endif
