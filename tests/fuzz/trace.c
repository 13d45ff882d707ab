/* The code of a trace's block: only faults of the guest come out, and coded again and read again they are the same. */
#include "fuzz.h"

#include "gmemd/native/trace_code.h"

#include <string.h>

static const uint64_t pages[] = {1000, 3, UINT64_C(1) << 40};
enum { REGIONS = sizeof pages / sizeof *pages };

static struct gm_trace_record first[GM_TRACE_CODE_RECORDS], second[GM_TRACE_CODE_RECORDS];

static void check_again(const struct gm_trace_record *records, uint32_t count)
{
    static uint8_t code[GM_TRACE_CODE_BYTES];
    uint64_t tick = 0;
    uint32_t length = 0;

    while (count) {
        struct gm_problem problem;
        uint64_t start = tick;
        int coded = gm_trace_encode(records, count, pages, REGIONS, &tick, code, &length, &problem);

        must(coded > 0);
        must(gm_trace_decode_untrusted(code, length, pages, REGIONS, &start, second, &problem) == coded);
        must(start == tick && memcmp(records, second, (size_t)coded * sizeof *records) == 0);
        records += coded;
        count -= (uint32_t)coded;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct gm_problem problem = {0};
    uint64_t tick = 0;
    int count;

    if (size > GM_TRACE_CODE_BYTES)
        return 0;
    count = gm_trace_decode_untrusted(data, (uint32_t)size, pages, REGIONS, &tick, first, &problem);
    must(count >= 0 && count <= GM_TRACE_CODE_RECORDS);
    for (int i = 0; i < count; i++)
        must(first[i].region < REGIONS && first[i].page < pages[first[i].region]);
    check_again(first, (uint32_t)count);
    return 0;
}
