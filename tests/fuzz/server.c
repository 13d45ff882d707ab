/*
 * The source's end of the urgent lane: whatever a destination asks, every frame of the answer is in order, and there are no more pages in
 * it than were asked for, and, sent ahead, each page of the guest once.
 */
#include "fuzz.h"

#include "gmemd/native/server.h"
#include "gmemd/native/source.h"

#include <pthread.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MOST_REQUESTS = 48, AHEAD = 16, BYTES = MOST_REQUESTS * GM_HEADER_BYTES };

struct answers {
    const struct gm_memory *memory;
    int socket, checksum;
    uint64_t pages;
};

static bool read_all(int socket, void *to, size_t size)
{
    for (size_t at = 0; at < size;) {
        ssize_t got = recv(socket, (char *)to + at, size - at, 0);

        if (got <= 0) {
            must(at == 0 || got <= 0);
            return false;
        }
        at += (size_t)got;
    }
    return true;
}

static void *read_answers(void *arg)
{
    static unsigned char content[GM_FRAME_PAGES * FUZZ_PAGE];
    struct answers *a = arg;
    unsigned char header[GM_HEADER_BYTES];

    while (read_all(a->socket, header, sizeof header)) {
        struct gm_problem problem;
        struct gm_frame f;

        must(gm_frame_decode_untrusted(header, a->memory, 1, a->checksum, "answers", &f, &problem) == 0);
        if (f.length && !read_all(a->socket, content, f.length))
            break;
        a->pages += f.count;
    }
    return NULL;
}

static size_t requests(struct fuzz_input *in, int checksum, unsigned char *out)
{
    static unsigned char frame[FUZZ_FRAME_BYTES];
    size_t size = 0;

    while (size < BYTES && fuzz_more(in)) {
        fuzz_frame(in, GM_KIND_REQUEST, checksum, frame);
        memcpy(out + size, frame, GM_HEADER_BYTES);
        size += GM_HEADER_BYTES;
    }
    return size;
}

/* Pages that the requests in order ask for, up to the first that is not; and whether all are. */
static uint64_t asked(const struct gm_memory *m, const unsigned char *data, size_t size, int checksum, bool *all)
{
    uint64_t pages = 0;

    *all = true;
    for (size_t at = 0; at + GM_HEADER_BYTES <= size; at += GM_HEADER_BYTES) {
        struct gm_problem problem;
        struct gm_frame f;

        *all = gm_frame_decode_untrusted(data + at, m, 0, checksum, "requests", &f, &problem) == 0;
        if (!*all)
            break;
        pages += f.count;
    }
    return pages;
}

static void serve(struct gm_source *source, struct answers *a, int near, const unsigned char *data, size_t size)
{
    struct gm_problem problem = {0};
    struct gm_server *server = gm_server_new(source, near, NULL, a->checksum, 0, AHEAD, &problem);
    pthread_t reader;

    must(server);
    must(pthread_create(&reader, NULL, read_answers, a) == 0);
    must(send(a->socket, data, size, MSG_NOSIGNAL) == (ssize_t)size);
    shutdown(a->socket, SHUT_WR);
    must(gm_server_run(server, &problem) < 0);
    must(problem.blame == GM_PEER || problem.blame == GM_LINK);
    shutdown(near, SHUT_RDWR);
    pthread_join(reader, NULL);
    gm_server_free(server);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = {data, data + size};
    unsigned how = (unsigned)fuzz_take(&in, 1);
    struct fuzz_guest guest = fuzz_guest_new(GM_POPULATE_WRITE);
    struct answers answers = {.memory = guest.memory, .checksum = how & 1};
    unsigned char out[BYTES];
    struct gm_problem problem;
    struct gm_source *source = gm_source_new(guest.memory, &problem);
    uint64_t wanted;
    bool all;
    size_t length;
    int ends[2];

    must(source && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    answers.socket = ends[0];
    if (how & 2) {
        length = (size_t)(in.end - in.at) < sizeof out ? (size_t)(in.end - in.at) : sizeof out;
        memcpy(out, in.at, length);
    } else {
        length = requests(&in, answers.checksum, out);
    }
    if (!(how & 4))
        gm_source_open(source);
    serve(source, &answers, ends[1], out, length);
    wanted = asked(guest.memory, out, length, answers.checksum, &all);
    must(answers.pages <= wanted + FUZZ_PAGES);
    must(answers.pages >= wanted || how & 4 || !all);
    gm_source_free(source);
    fuzz_guest_free(&guest);
    close(ends[0]);
    close(ends[1]);
    return 0;
}
