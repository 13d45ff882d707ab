#include "model.h"

#include "base.h"
#include "workload.h"

uint32_t *model_filled(const struct guest_params *params)
{
    uint32_t *versions = allocate(params->data_pages, sizeof(*versions));

    for (uint64_t page = 0; page < params->data_pages; page++)
        versions[page] = !workload_is_hole(params, page);
    return versions;
}

void model_replay(const struct guest_params *params, const uint64_t *from, const uint64_t *to,
                  uint32_t *versions)
{
    for (uint64_t id = 0; id < params->vcpus; id++) {
        uint64_t owned = workload_owned(params, id);

        for (uint64_t step = from[id]; step < to[id]; step++)
            versions[workload_page(params, id, workload_choice(params, owned, id, step))]++;
    }
}

uint64_t model_differs(const struct guest_params *params, uint64_t page, uint32_t version,
                       const uint64_t *words, uint64_t *ret_expected)
{
    struct workload_content content = workload_content(params->workload.seed, page, version);
    uint64_t difference = 0;

    /* All words first, as fast as vectors go; which one it was matters once in a lifetime. */
    for (uint64_t i = 0; i < GUEST_WORDS; i++)
        difference |= words[i] ^ (content.first + i * content.increment);
    for (uint64_t i = 0; difference && i < GUEST_WORDS; i++) {
        *ret_expected = content.first + i * content.increment;
        if (words[i] != *ret_expected)
            return i;
    }
    return GUEST_WORDS;
}
