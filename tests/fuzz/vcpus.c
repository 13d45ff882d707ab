/*
 * What a VMM says and does on its fault socket: a page of a region that has a bitmap comes out, or a reason that names the VMM; each
 * answer is for what was asked, as long as the VMM reads them; and when it has read, it is told to ask again.
 */
#include "fuzz.h"

#include "gmemd/native/destination.h"
#include "gmemd/native/memfile.h"
#include "gmemd/native/vcpus.h"

#include <endian.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { VCPUS = 3, PAGES = 16, MESSAGE = 16, BASE = 1 << 20, MOST_STEPS = 64 };

/* As in docs/handoff.md. */
struct message {
    uint32_t vcpu, pages;
    uint64_t gpa;
};

struct rig {
    struct gm_destination *destination;
    struct gm_region *region; /* the one with a bitmap */
    int near, far;
    bool closed;
};

static struct gm_destination *destination(void)
{
    static struct gm_destination *d;
    struct gm_region_spec specs[] = {
        {.fd = -1, .uffd = -1, .bitmap = -1, .page_shift = 12, .pages = PAGES, .gpa = BASE},
        {.fd = -1, .uffd = -1, .bitmap = -1, .page_shift = 12, .pages = PAGES, .gpa = UINT64_MAX - 0xffff},
    };
    struct gm_problem problem;

    if (!d) {
        specs[0].bitmap = gm_memfile_memfd("bitmap", FUZZ_PAGE, 0, &problem);
        must(fcntl(specs[0].bitmap, F_ADD_SEALS, F_SEAL_SHRINK) == 0);
        d = gm_destination_new(gm_memory_new("fuzz", specs, 2, &problem), 0, &problem);
        must(d);
    }
    return d;
}

/* A page that came in place ends the wait for it. */
static void answer(struct rig *rig, const struct gm_wait *wait)
{
    gm_bitmap_set(rig->region->received, wait->page, 1);
    gm_vcpus_answer(rig->destination, rig->region, wait);
    must(!gm_bitmap_test(rig->region->userfault, wait->page));
}

static void take_all(struct rig *rig)
{
    for (;;) {
        struct gm_problem problem = {0};
        struct gm_wait wait = {0};
        struct gm_region *region = NULL;
        int got = gm_vcpus_take_untrusted(rig->destination, &wait, &region, &problem);

        if (!got)
            return;
        if (got > 0) {
            must(region == rig->region && wait.region == 0 && wait.page < PAGES && wait.thread < VCPUS);
            answer(rig, &wait);
        } else {
            must(problem.blame == GM_VMM && problem.text[0]);
            if (rig->closed)
                return;
        }
    }
}

/* What the VMM reads is an answer, or for every vCPU. */
static void hear(struct rig *rig)
{
    struct message m;
    ssize_t got = recv(rig->far, &m, sizeof m, MSG_DONTWAIT);

    if (got < 0 || (got == 0 && rig->closed))
        return;
    must(got == sizeof m);
    if (le32toh(m.vcpu) == UINT32_MAX) {
        must(!m.pages && !m.gpa);
        return;
    }
    must(le32toh(m.vcpu) < VCPUS && le64toh(m.gpa) >= BASE && le32toh(m.pages) > 0);
    must((le64toh(m.gpa) - BASE) / FUZZ_PAGE + le32toh(m.pages) <= PAGES);
}

static void say(const struct rig *rig, struct fuzz_input *in, bool raw)
{
    struct message m = {.vcpu = htole32((uint32_t)fuzz_take(in, 1) % (VCPUS + 1)), .gpa = htole64(BASE + fuzz_take(in, 2))};
    size_t size = raw ? fuzz_take(in, 1) % (2 * MESSAGE) : sizeof m;

    size = size < (size_t)(in->end - in->at) || !raw ? size : (size_t)(in->end - in->at);
    send(rig->far, raw ? (const void *)in->at : &m, size, MSG_DONTWAIT | MSG_NOSIGNAL);
    in->at += raw ? size : 0;
}

static void flood(struct rig *rig)
{
    struct gm_wait wait = {.page = 1};

    /* Of a VMM that reads nothing. */
    while (!atomic_load(&rig->destination->vcpus_deaf))
        answer(rig, &wait);
}

static void step(struct rig *rig, struct fuzz_input *in)
{
    unsigned what = (unsigned)fuzz_take(in, 1);

    if (what == 0xff && !rig->closed) {
        rig->closed = true;
        shutdown(rig->far, SHUT_RDWR);
    } else if (what == 0xfe && !rig->closed) {
        flood(rig);
    } else if (what >= 0xe0) {
        gm_vcpus_ask_again(rig->destination);
    } else if (what >= 0xc0) {
        gm_bitmap_clear(rig->region->received, fuzz_take(in, 1) % PAGES, 1);
    } else if (what >= 0x80) {
        hear(rig);
    } else {
        say(rig, in, what >= 0x40);
    }
    take_all(rig);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = {data, data + size};
    struct rig rig = {.destination = destination()};
    struct gm_problem problem;
    int ends[2];

    must(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
    rig.far = ends[0];
    rig.near = ends[1];
    rig.region = &rig.destination->memory->region[0];
    gm_bitmap_clear(rig.region->received, 0, PAGES);
    gm_destination_set_vcpus(rig.destination, rig.near, VCPUS);
    atomic_store(&rig.destination->vcpus_deaf, false);
    for (unsigned n = 0; n < MOST_STEPS && fuzz_more(&in); n++)
        step(&rig, &in);
    must((gm_destination_events(rig.destination, &problem) & ~(uint32_t)(GM_EVENT_VMM_BROKEN | GM_EVENT_STUCK)) == 0);
    close(rig.near);
    close(rig.far);
    return 0;
}
