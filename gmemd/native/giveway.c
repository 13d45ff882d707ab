#include "giveway.h"

#include <stdatomic.h>
#include <stdbool.h>

enum {
    TURN_US = 10000,     /* a change shows in what is waited for after some of these */
    SILENCE_US = 100000, /* after which nobody waits */
    SPARE_US = 150,      /* what both ends and a busy host need beside the round trip, twice */
    MANY = 4,            /* one in so many is late: those that a busy host alone delays are fewer */
    SLOWER_BY = 4,
    SHARE = 4,      /* of what the line carries: one in so many is always the background's */
    SHORT = 8,      /* a lane that is held back comes closer to its rate than one in so many */
    BELIEVED = 4,   /* turns after which the line has become slower; before, the lanes may have had nothing to send */
    CALM = 3, /* turns in which the rate grows by a 16th, an 8th and a quarter; then by half */
};

/* A migration goes on, whatever is waited for. */
static const uint64_t LEAST_RATE = 8 << 20;
/* Faster than what any lane can do: then there is no need for a limit. */
static const uint64_t MOST_RATE = UINT64_C(16) << 30;

static uint64_t faster(uint64_t rate, unsigned calm)
{
    rate += rate >> (CALM + 1 - (calm < CALM ? calm : CALM));
    return rate > MOST_RATE ? 0 : rate;
}

static void note_carried(struct gm_giveway *g, uint64_t rate, uint64_t seen)
{
    g->fell_short = seen < rate - rate / SHORT ? g->fell_short + 1 : 0;
    if (seen > g->carried || g->fell_short >= BELIEVED)
        g->carried = seen;
}

/* `seen` is how fast it was: a limit above that has not been one. */
static uint64_t slower(struct gm_giveway *g, uint64_t rate, uint64_t seen)
{
    uint64_t least;

    note_carried(g, rate, seen);
    least = g->carried / SHARE > LEAST_RATE ? g->carried / SHARE : LEAST_RATE;
    if (!rate || rate > seen)
        rate = seen;
    rate -= rate / SLOWER_BY;
    return rate < least ? least : rate;
}

static void begin_turn(struct gm_giveway *g, uint64_t now_ns, uint64_t sent)
{
    g->since_ns = now_ns;
    g->sent = sent;
    g->waits = g->late = 0;
}

void gm_giveway_queue(struct gm_giveway *g, uint32_t queue_us)
{
    atomic_store_explicit(&g->queue_us, queue_us, memory_order_relaxed);
}

void gm_giveway_wait(struct gm_giveway *g, uint64_t now_ns, uint32_t waited_us, uint32_t round_trip_us, uint64_t sent)
{
    uint64_t turn_us = (now_ns - g->since_ns) / 1000, rate = atomic_load(&g->rate);

    atomic_store(&g->heard_ns, now_ns);
    if (turn_us > SILENCE_US)
        begin_turn(g, now_ns, sent);
    g->waits++;
    g->late += waited_us > 2 * round_trip_us + SPARE_US && atomic_load(&g->queue_us) > SPARE_US;
    if (turn_us < TURN_US || turn_us > SILENCE_US)
        return;
    if (g->late * MANY > g->waits) {
        atomic_store(&g->rate, slower(g, rate, (sent - g->sent) * 1000000 / turn_us));
        g->calm = 0;
    } else {
        atomic_store(&g->rate, faster(rate, g->calm++));
    }
    begin_turn(g, now_ns, sent);
}

uint64_t gm_giveway_rate(const struct gm_giveway *g, uint64_t now_ns)
{
    /* Another thread may have noted a wait since the clock was read. */
    return now_ns > atomic_load(&g->heard_ns) + (uint64_t)SILENCE_US * 1000 ? 0 : atomic_load(&g->rate);
}
