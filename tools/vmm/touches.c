#include "touches.h"

#include "base.h"
#include "json.h"

/* This thread may be preempted between the two readings: the quickest of some tries is taken. */
struct clocks clocks_read(void)
{
    struct clocks best = {0};
    uint64_t gap = UINT64_MAX;

    for (unsigned try = 0; try < 10; try++) {
        uint64_t before = __builtin_ia32_rdtsc(), ns = now_ns(), after = __builtin_ia32_rdtsc();

        if (after - before >= gap)
            continue;
        gap = after - before;
        best = (struct clocks){.ticks = before, .ns = ns};
    }
    return best;
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

static double smaller(double a, double b)
{
    return a < b ? a : b;
}

/* The value at a share of all touches. The last bucket's middle may lie above the longest touch. */
static double percentile(const struct guest_cpu *all, double share)
{
    uint64_t rank = (uint64_t)((double)all->touches * share), seen = 0;

    for (uint64_t i = 0; i < GUEST_BUCKETS; i++) {
        seen += all->touch_histogram[i];
        if (seen > rank)
            return smaller(bucket_middle(i), (double)all->touch_max);
    }
    return 0;
}

uint64_t touches_blocked(const struct machine *machine)
{
    uint64_t blocked = 0;

    for (unsigned id = 0; id < machine->vcpus; id++)
        blocked += *(const volatile uint64_t *)&machine_cpu(machine, id)->blocked;
    return blocked;
}

static struct guest_cpu sum_up(const struct machine *machine)
{
    struct guest_cpu all = {0};

    for (unsigned id = 0; id < machine->vcpus; id++) {
        const struct guest_cpu *cpu = machine_cpu(machine, id);

        all.touches += cpu->touches;
        all.touch_sum += cpu->touch_sum;
        if (cpu->touch_max > all.touch_max)
            all.touch_max = cpu->touch_max;
        for (unsigned i = 0; i < GUEST_BUCKETS; i++)
            all.touch_histogram[i] += cpu->touch_histogram[i];
    }
    return all;
}

void touches_report(const struct machine *machine, struct json *json, double ticks_per_us)
{
    struct guest_cpu all = sum_up(machine);
    double touches = all.touches ? (double)all.touches : 1;

    json_number(json, "touches", all.touches);
    json_open(json, "touch_latency_us", '{');
    json_fraction(json, "p50", percentile(&all, 0.5) / ticks_per_us);
    json_fraction(json, "p90", percentile(&all, 0.9) / ticks_per_us);
    json_fraction(json, "p99", percentile(&all, 0.99) / ticks_per_us);
    json_fraction(json, "max", (double)all.touch_max / ticks_per_us);
    json_fraction(json, "mean", (double)all.touch_sum / touches / ticks_per_us);
    json_close(json, '}');
}
