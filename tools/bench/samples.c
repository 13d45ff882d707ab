#include "samples.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "../vmm/base.h"

struct samples samples_create(size_t room)
{
    struct samples samples = {.room = room};

    samples.ns = mmap(NULL, room * sizeof(*samples.ns), PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (samples.ns == MAP_FAILED)
        fail(EX_OSERR, "memory for %zu samples: %s", room, strerror(errno));
    return samples;
}

static int compare(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

static double at_share(const struct samples *samples, double share)
{
    size_t rank = (size_t)((double)samples->count * share);

    if (!samples->count)
        return 0;
    return (double)samples->ns[rank < samples->count ? rank : samples->count - 1] / 1000;
}

void samples_report(struct samples *samples, struct json *json, const char *key)
{
    double sum = 0;

    qsort(samples->ns, samples->count, sizeof(*samples->ns), compare);
    for (size_t i = 0; i < samples->count; i++)
        sum += (double)samples->ns[i] / 1000;
    json_open(json, key, '{');
    json_number(json, "count", samples->count);
    json_fraction(json, "p50", at_share(samples, 0.5));
    json_fraction(json, "p90", at_share(samples, 0.9));
    json_fraction(json, "p99", at_share(samples, 0.99));
    json_fraction(json, "p99.9", at_share(samples, 0.999));
    json_fraction(json, "max", at_share(samples, 1));
    json_fraction(json, "mean", samples->count ? sum / (double)samples->count : 0);
    json_fraction(json, "sum", sum);
    json_close(json, '}');
}
