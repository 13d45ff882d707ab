/* What a VMM sends on its fault socket: a page of a region that has a bitmap comes out, or a reason that names the VMM. */
#include "fuzz.h"

#include "gmemd/native/destination.h"
#include "gmemd/native/memfile.h"
#include "gmemd/native/vcpus.h"

#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { VCPUS = 3, PAGES = 16, MESSAGE = 16 };

static struct gm_destination *destination(int *far)
{
    static struct gm_destination *d;
    static int ends[2];
    struct gm_region_spec specs[] = {
        {.fd = -1, .uffd = -1, .bitmap = -1, .page_shift = 12, .pages = PAGES, .gpa = 1 << 20},
        {.fd = -1, .uffd = -1, .bitmap = -1, .page_shift = 12, .pages = PAGES, .gpa = UINT64_MAX - 0xffff},
    };
    struct gm_problem problem;

    if (!d) {
        specs[0].bitmap = gm_memfile_memfd("bitmap", FUZZ_PAGE, 0, &problem);
        must(fcntl(specs[0].bitmap, F_ADD_SEALS, F_SEAL_SHRINK) == 0);
        d = gm_destination_new(gm_memory_new("fuzz", specs, 2, &problem), 0, &problem);
        must(d && socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
        gm_destination_set_vcpus(d, ends[1], VCPUS);
    }
    *far = ends[0];
    return d;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct gm_problem problem = {0};
    struct gm_wait wait = {0};
    struct gm_region *region = NULL;
    int far;
    struct gm_destination *d = destination(&far);

    must(send(far, data, size < 2 * MESSAGE ? size : 2 * MESSAGE, 0) >= 0);
    if (gm_vcpus_take_untrusted(d, &wait, &region, &problem) > 0) {
        must(region == &d->memory->region[0] && wait.region == 0 && wait.page < PAGES && wait.thread < VCPUS);
    } else {
        must(problem.blame == GM_VMM && problem.text[0]);
    }
    return 0;
}
