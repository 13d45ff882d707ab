/* The state that a predecessor left: refused with a reason, or taken over with every page either received or free to be claimed. */
#include "fuzz.h"

#include "gmemd/native/memfile.h"
#include "gmemd/native/memory_layout.h"

#include <fcntl.h>
#include <string.h>
#include <unistd.h>

enum { FILE_BYTES = 64 << 10, FDS = 3, RUNS = 16 };

static int state_of(const uint8_t *data, size_t size, bool mended)
{
    struct gm_problem problem;
    struct gm_state head = {.version = GM_STATE_VERSION};
    int fd = gm_memfile_memfd("state", size, 0, &problem);

    must(fd >= 0 && pwrite(fd, data, size, 0) == (ssize_t)size);
    if (mended && size >= sizeof head) {
        memcpy(head.magic, gm_state_magic, sizeof head.magic);
        must(pwrite(fd, &head, offsetof(struct gm_state, regions), 0) > 0);
        head.size = size;
        must(pwrite(fd, &head.size, sizeof head.size, offsetof(struct gm_state, size)) == sizeof head.size);
    }
    must(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) == 0);
    return fd;
}

static void look(struct gm_memory *m)
{
    uint64_t total = 0;

    for (unsigned i = 0; i < gm_memory_regions(m); i++) {
        uint64_t pairs[2 * RUNS], from = 0;
        struct gm_region_spec spec;
        int populate;
        unsigned runs;

        gm_memory_region(m, i, &spec, &populate);
        do {
            runs = gm_memory_runs(m, i, GM_CLAIMED, &from, pairs, RUNS);
            for (unsigned run = 0; run < runs; run++) {
                must(pairs[2 * run] + pairs[2 * run + 1] <= m->region[i].pages);
                total += pairs[2 * run + 1];
            }
        } while (runs == RUNS);
    }
    must(total == gm_memory_received(m));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct gm_problem problem = {0};
    struct gm_memory *memory;
    int state, fds[FDS];

    if (size < 2)
        return 0;
    state = state_of(data + 1, size - 1, data[0] & 1);
    for (unsigned i = 0; i < FDS; i++) {
        fds[i] = gm_memfile_memfd("file", FILE_BYTES, 0, &problem);
        must(fds[i] >= 0);
    }
    must(fcntl(fds[FDS - 1], F_ADD_SEALS, F_SEAL_SHRINK) == 0);
    memory = gm_memory_adopt(state, fds, FDS, &problem);
    if (memory)
        look(memory);
    else
        must(problem.text[0]);
    gm_memory_free(memory);
    for (unsigned i = 0; i < FDS; i++)
        close(fds[i]);
    close(state);
    return 0;
}
