/* How long the guest's first touches of pages took, from the histograms that it kept itself. */
#ifndef GMEMD_VMM_TOUCHES_H
#define GMEMD_VMM_TOUCHES_H

#include "machine.h"

struct json;

/* A reading of both clocks; two of them tell how many ticks a microsecond has. */
struct clocks {
    uint64_t ticks, ns;
};

struct clocks clocks_read(void);
double clocks_ticks_per_us(struct clocks from, struct clocks to);

/* Ticks that vCPUs have spent in touches that came to an end. */
uint64_t touches_blocked(const struct machine *machine);

/* Adds "touches" and "touch_latency_us" to an event. */
void touches_report(const struct machine *machine, struct json *json, double ticks_per_us);

#endif
