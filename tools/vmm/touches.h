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

/* Adds touches, touch_latency_us and blocked_share to an event. */
void touches_report(const struct machine *machine, struct json *json, uint64_t measured_ns,
                    double ticks_per_us);

#endif
