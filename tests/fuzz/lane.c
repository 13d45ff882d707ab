/*
 * The receiving end of a page lane: whatever bytes a source sends, in whatever pieces, and whatever it says is zero or the VMM takes out in
 * between, nothing outside the regions is written, a page that was received never changes again unless it is taken out, and no claim is
 * held when the lane has ended.
 */
#include "fuzz.h"

#include "gmemd/native/destination.h"
#include "gmemd/native/lane.h"

#include <stdatomic.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BUDGET_US = 1000000, MOST_FRAMES = 16 };
enum { PAGES_OF_ALL = FUZZ_PAGES + FUZZ_BIG_PAGES };

struct rig {
    struct fuzz_guest guest;
    struct gm_destination *destination;
    struct gm_lane *lane;
    int far;
    bool over;
    bool known[PAGES_OF_ALL];
    uint32_t content[PAGES_OF_ALL];
};

static void look(struct rig *rig)
{
    unsigned at = 0;

    for (unsigned i = 0; i < 2; i++) {
        const struct gm_region *r = &rig->guest.memory->region[i];

        for (uint64_t page = 0; page < r->pages; page++, at++) {
            bool received = gm_bitmap_test(r->received, page);

            must(received || !rig->known[at]);
            must(gm_bitmap_test(r->claimed, page) == received);
            if (!received)
                continue;
            if (rig->known[at])
                must(rig->content[at] == fuzz_guest_page(&rig->guest, i, page));
            rig->content[at] = fuzz_guest_page(&rig->guest, i, page);
            rig->known[at] = true;
        }
    }
    fuzz_guest_check(&rig->guest);
}

static void receive(struct rig *rig)
{
    struct gm_problem problem = {0};

    while (!rig->over) {
        int state = gm_lane_receive(rig->lane, BUDGET_US, &problem);

        if (state == GM_LANE_IDLE)
            break;
        rig->over = state < 0;
        must(!rig->over || problem.blame == GM_PEER || problem.blame == GM_LINK);
    }
}

static void feed(struct rig *rig, const unsigned char *data, size_t size, size_t piece)
{
    for (size_t at = 0; at < size && !rig->over;) {
        size_t here = piece && piece < size - at ? piece : size - at;
        ssize_t put = send(rig->far, data + at, here, MSG_DONTWAIT | MSG_NOSIGNAL);

        if (put > 0)
            at += (size_t)put;
        receive(rig);
    }
}

/* Pages that are zero at the source, or that the VMM takes out, which may be zero from then on. */
static void empty(struct rig *rig, struct fuzz_input *in, bool discard)
{
    unsigned region = fuzz_take(in, 1) & 1;
    uint64_t pages = rig->guest.memory->region[region].pages;
    uint64_t first = fuzz_take(in, 1) % pages, count = fuzz_take(in, 1) % (pages - first) + 1;
    struct gm_problem problem;

    if (discard) {
        must(gm_destination_discard(rig->destination, region, first, count, &problem) == 0);
        memset(rig->known + (region ? FUZZ_PAGES : 0) + first, 0, count * sizeof *rig->known);
    } else {
        must(gm_destination_told_zero(rig->destination, region, first, count, &problem) >= 0);
    }
}

static void play(struct rig *rig, struct fuzz_input *in, bool raw, int checksum, size_t piece)
{
    static unsigned char frame[FUZZ_FRAME_BYTES];
    static const int kinds[] = {GM_KIND_PAGES, GM_KIND_ZERO, GM_KIND_BEAT, GM_KIND_PAGES};

    if (raw) {
        feed(rig, in->at, (size_t)(in->end - in->at), piece);
        return;
    }
    for (unsigned n = 0; n < MOST_FRAMES && fuzz_more(in) && !rig->over; n++) {
        unsigned kind = (unsigned)fuzz_take(in, 1);
        size_t size;

        if (kind >= 0xe0 && kind < 0xf8) {
            empty(rig, in, kind >= 0xf0);
            continue;
        }
        size = fuzz_frame(in, kinds[kind & 3], checksum, frame);
        feed(rig, frame, kind >= 0xf8 ? size / 2 : size, piece);
        if (n % 8 == 0)
            look(rig);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const int ways[] = {GM_POPULATE_WRITE, GM_POPULATE_RECV, GM_POPULATE_COPY, GM_POPULATE_RECV};
    static const size_t pieces[] = {0, 1000, 5000, 333};
    struct fuzz_input in = {data, data + size};
    unsigned how = (unsigned)fuzz_take(&in, 1);
    int checksum = how >> 3 & 1, ends[2];
    struct gm_problem problem;
    struct rig rig = {.guest = fuzz_guest_new(ways[how & 3])};

    must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    rig.far = ends[0];
    rig.destination = gm_destination_new(rig.guest.memory, 0, &problem);
    must(rig.destination);
    rig.lane = gm_lane_new(rig.destination, 0, ends[1], NULL, checksum, &problem);
    must(rig.lane);
    play(&rig, &in, how >> 4 & 1, checksum, pieces[how >> 5 & 3]);
    shutdown(rig.far, SHUT_WR);
    receive(&rig);
    must(rig.over);
    look(&rig);
    gm_lane_free(rig.lane);
    gm_destination_free(rig.destination);
    fuzz_guest_free(&rig.guest);
    close(ends[0]);
    close(ends[1]);
    return 0;
}
