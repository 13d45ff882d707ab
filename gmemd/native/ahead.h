/*
 * What will be needed: a guest that has faulted on a page and then on the one behind what it got for it is walking through memory, and
 * gets the next pages before it asks, twice as many each time. One that jumps gets nothing that it did not ask for.
 */
#ifndef GM_AHEAD_H
#define GM_AHEAD_H

#include <stdint.h>

/* Walks that are followed at a time: about one a vCPU. */
enum { GM_WALKS = 16 };

struct gm_walk {
    uint64_t next; /* the page that the guest would fault on if it goes on */
    uint32_t region, window;
    uint64_t used; /* when it was last seen, in requests */
};

struct gm_ahead {
    uint32_t most; /* pages ahead at most, 0 for none */
    uint64_t now;
    struct gm_walk walk[GM_WALKS];
};

/* Learns of a fault. Returns how many pages behind it to send unasked. */
uint32_t gm_ahead_fault(struct gm_ahead *a, uint32_t region, uint64_t page);

#endif
