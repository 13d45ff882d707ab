#include "vcpus.h"

#include <endian.h>
#include <errno.h>
#include <stdatomic.h>
#include <sys/socket.h>

/* Both ways 16 bytes, little-endian. In a request `pages` is 0; in an answer it is 1 or more. */
struct message {
    uint32_t vcpu, pages;
    uint64_t gpa;
};

static const uint32_t EVERY_VCPU = UINT32_MAX;

_Static_assert(sizeof(struct message) == 16, "a message is 16 bytes");

int gm_vcpus_take_untrusted(const struct gm_destination *d, struct gm_wait *wait, struct gm_region **region,
                            struct gm_problem *ret)
{
    struct message m = {0};
    ssize_t got = recv(d->vcpu_socket, &m, sizeof m, MSG_DONTWAIT | MSG_TRUNC);
    uint32_t vcpu = le32toh(m.vcpu);
    uint64_t gpa = le64toh(m.gpa);

    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (got < 0)
        return gm_blame(ret, GM_VMM, errno, "fault socket");
    if (got == 0)
        return gm_blame(ret, GM_VMM, 0, "fault socket: closed by the VMM");
    if (got != sizeof m || m.pages)
        return gm_blame(ret, GM_VMM, 0, "fault socket: a message of %zd bytes (%zu expected, the second word 0): sent by the VMM",
                        got, sizeof m);
    if (vcpu >= d->vcpus)
        return gm_blame(ret, GM_VMM, 0, "fault socket: vCPU %u of %u: sent by the VMM", vcpu, d->vcpus);
    *region = gm_memory_find_guest(d->memory, gpa);
    if (!*region || !(*region)->userfault)
        return gm_blame(ret, GM_VMM, 0, "fault socket: guest physical address %#llx lies in no region with a userfault bitmap: sent by the VMM",
                        (unsigned long long)gpa);
    wait->region = (*region)->index;
    wait->page = (gpa - (*region)->gpa) >> (*region)->page_shift;
    wait->thread = vcpu;
    return 1;
}

/* An answer that finds no room is lost: the VMM has to ask again, once it can be told so. */
static void tell(struct gm_destination *d, const struct message *m)
{
    struct gm_problem problem;
    bool passes;

    if (send(d->vcpu_socket, m, sizeof *m, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
        return;
    passes = errno == EAGAIN || errno == ENOBUFS || errno == ENOMEM;
    if (errno == EAGAIN)
        gm_blame(&problem, GM_VMM, 0, "fault socket: full of answers that the VMM does not read; until it does, its requests are not read");
    else if (passes)
        gm_blame(&problem, GM_KERNEL, errno, "fault socket: an answer was lost; until the VMM can be told, its requests are not read");
    else
        gm_blame(&problem, GM_VMM, errno, "fault socket: the VMM takes no answer");
    if (passes) {
        atomic_store(&d->vcpus_deaf, true);
        gm_destination_kick(d);
    }
    gm_destination_tell(d, passes ? GM_EVENT_STUCK : GM_EVENT_VMM_BROKEN, &problem);
}

void gm_vcpus_answer(struct gm_destination *d, const struct gm_region *r, const struct gm_wait *wait)
{
    uint64_t limit = wait->page + GM_FRAME_PAGES < r->pages ? wait->page + GM_FRAME_PAGES : r->pages;
    uint64_t end = gm_bitmap_find(r->received, wait->page, limit, false);
    struct message m = {
        .vcpu = htole32(wait->thread),
        .pages = htole32((uint32_t)(end - wait->page)),
        .gpa = htole64(r->gpa + gm_bytes(r, wait->page)),
    };

    /* Another thread may be between setting received bits and clearing these. */
    gm_bitmap_clear(r->userfault, wait->page, end - wait->page);
    tell(d, &m);
}

bool gm_vcpus_ask_again(struct gm_destination *d)
{
    struct message m = {.vcpu = htole32(EVERY_VCPU)};

    atomic_store(&d->vcpus_deaf, false);
    tell(d, &m);
    return !atomic_load(&d->vcpus_deaf);
}
