#include "touches.h"

#include "base.h"
#include "json.h"

struct clocks clocks_read(void)
{
    return (struct clocks){.ticks = __builtin_ia32_rdtsc(), .ns = now_ns()};
}

double clocks_ticks_per_us(struct clocks from, struct clocks to)
{
    return (double)(to.ticks - from.ticks) * 1000 / (double)(to.ns - from.ns);
}

/* The middle of a bucket, in ticks. */
static double bucket_middle(uint64_t index)
{
    uint64_t octave = index / GUEST_OCTAVE, part = index % GUEST_OCTAVE;

    if (octave == 0)
        return (double)part;
    return ((double)(GUEST_OCTAVE + part) + 0.5) * (double)(1ull << (octave - 1));
}

static double percentile(const uint64_t *histogram, uint64_t touches, double share)
{
    uint64_t rank = (uint64_t)((double)touches * share), seen = 0;

    for (uint64_t i = 0; i < GUEST_BUCKETS; i++) {
        seen += histogram[i];
        if (seen > rank)
            return bucket_middle(i);
    }
    return 0;
}

void touches_report(const struct machine *machine, struct json *json, uint64_t measured_ns,
                    double ticks_per_us)
{
    uint64_t histogram[GUEST_BUCKETS] = {0}, touches = 0, sum = 0, most = 0, blocked = 0;
    double all_ns = (double)measured_ns * machine->vcpus;

    for (unsigned id = 0; id < machine->vcpus; id++) {
        const struct guest_cpu *cpu = machine_cpu(machine, id);

        touches += cpu->touches;
        sum += cpu->touch_sum;
        blocked += cpu->blocked;
        most = cpu->touch_max > most ? cpu->touch_max : most;
        for (unsigned i = 0; i < GUEST_BUCKETS; i++)
            histogram[i] += cpu->touch_histogram[i];
    }
    json_number(json, "touches", touches);
    json_open(json, "touch_latency_us", '{');
    json_fraction(json, "p50", percentile(histogram, touches, 0.5) / ticks_per_us);
    json_fraction(json, "p90", percentile(histogram, touches, 0.9) / ticks_per_us);
    json_fraction(json, "p99", percentile(histogram, touches, 0.99) / ticks_per_us);
    json_fraction(json, "max", (double)most / ticks_per_us);
    json_fraction(json, "mean", touches ? (double)sum / (double)touches / ticks_per_us : 0);
    json_close(json, '}');
    json_fraction(json, "blocked_share",
                  measured_ns ? (double)blocked * 1000 / ticks_per_us / all_ns : 0);
}
