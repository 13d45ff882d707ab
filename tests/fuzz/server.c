/*
 * The source's end of the urgent lane: whatever a destination asks, every frame of the answer is in order and says what the guest's memory
 * holds, and there are no more pages in it than were asked for, and, sent ahead, each page of the guest once.
 *
 * Who reads the answers is a thread that stays from input to input, as do the guest and its memory file: to make them anew took nearly all
 * of the time.
 */
#include "fuzz.h"

#include "gmemd/native/memfile.h"
#include "gmemd/native/server.h"
#include "gmemd/native/source.h"
#include "gmemd/native/trace.h"

#include <pthread.h>
#include <semaphore.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MOST_REQUESTS = 48, AHEAD = 16, BYTES = MOST_REQUESTS * GM_HEADER_BYTES, RECORDS = 64 };

/* Bits of the first byte of an input. */
enum { CHECKSUM = 1, RAW = 2, CLOSED = 4, BEAT = 8, LEARN = 16, STOP = 32, NARROW = 64 };

static struct {
    pthread_t thread;
    sem_t begin, end;
    struct fuzz_guest guest;
    int socket, checksum;
    uint64_t pages, beats;
} answers;

static bool read_all(int socket, void *to, size_t size)
{
    for (size_t at = 0; at < size;) {
        ssize_t got = recv(socket, (char *)to + at, size - at, 0);

        if (got <= 0)
            return false;
        at += (size_t)got;
    }
    return true;
}

static void must_be_the_guests(const struct gm_frame *f, const unsigned char *content)
{
    static unsigned char own[GM_FRAME_PAGES * FUZZ_PAGE];
    const struct gm_region *r = &answers.guest.memory->region[f->region];
    size_t size = gm_bytes(r, f->count);

    if (f->kind == GM_KIND_BEAT)
        return;
    must(size <= sizeof own && gm_memfile_read(r->fd, own, size, gm_file_offset(r, f->first)) == 0);
    must(f->kind == GM_KIND_ZERO ? gm_is_zero(own, size) : f->length == size && !memcmp(own, content, size));
}

static void read_answers(void)
{
    static unsigned char content[GM_FRAME_PAGES * FUZZ_PAGE];
    unsigned char header[GM_HEADER_BYTES];

    while (read_all(answers.socket, header, sizeof header)) {
        struct gm_problem problem;
        struct gm_frame f;

        must(gm_frame_decode_untrusted(header, answers.guest.memory, 1, answers.checksum, "answers", &f, &problem) == 0);
        if (f.length && !read_all(answers.socket, content, f.length))
            break;
        must_be_the_guests(&f, content);
        answers.pages += f.count;
        answers.beats += f.kind == GM_KIND_BEAT;
    }
}

static void *read_for_ever(void *arg)
{
    for (;; sem_post(&answers.end)) {
        sem_wait(&answers.begin);
        read_answers();
    }
    return arg;
}

/* Every third page has a content; the others are zero. */
static void set_up(void)
{
    unsigned char content[2 * FUZZ_PAGE];

    if (answers.guest.memory)
        return;
    answers.guest = fuzz_guest_new(GM_POPULATE_WRITE);
    for (unsigned region = 0; region < 2; region++) {
        const struct gm_region *r = &answers.guest.memory->region[region];

        for (uint64_t page = 0; page < r->pages; page += 3) {
            memset(content, (int)page + 1, sizeof content);
            must(gm_memfile_write(r->fd, content, gm_bytes(r, 1), gm_file_offset(r, page)) == 0);
        }
    }
    must(sem_init(&answers.begin, 0, 0) == 0 && sem_init(&answers.end, 0, 0) == 0);
    must(pthread_create(&answers.thread, NULL, read_for_ever, NULL) == 0);
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

/* Runs until the requests have been answered: the last thing that is said is the end, or is that it shall stop. */
static void serve(struct gm_source *source, unsigned how, int near, const unsigned char *data, size_t size)
{
    struct gm_problem problem = {0};
    struct gm_server *server = gm_server_new(source, near, NULL, answers.checksum, 0, AHEAD, &problem);
    int ended;

    must(server);
    must(send(answers.socket, data, size, MSG_NOSIGNAL) == (ssize_t)size);
    if (how & BEAT)
        gm_server_beat(server);
    if (how & STOP)
        gm_server_stop(server);
    shutdown(answers.socket, SHUT_WR);
    sem_post(&answers.begin);
    ended = gm_server_run(server, &problem);
    must(ended == 0 ? how & STOP : problem.blame == GM_PEER || problem.blame == GM_LINK);
    must(gm_server_heard_ns(server) > 0);
    shutdown(near, SHUT_RDWR);
    sem_wait(&answers.end);
    gm_server_free(server);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct fuzz_input in = {data, data + size};
    unsigned how = (unsigned)fuzz_take(&in, 1);
    unsigned char out[BYTES];
    struct gm_problem problem;
    struct gm_source *source;
    uint64_t wanted;
    bool all;
    size_t length;
    int ends[2], least = 1;

    set_up();
    source = gm_source_new(answers.guest.memory, &problem);
    must(source && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    if (how & NARROW)
        must(setsockopt(ends[1], SOL_SOCKET, SO_SNDBUF, &least, sizeof least) == 0);
    answers.socket = ends[0];
    answers.checksum = how & CHECKSUM;
    answers.pages = answers.beats = 0;
    gm_source_restart(source);
    if (how & LEARN)
        must(gm_source_learn(source, RECORDS, &problem));
    if (how & RAW) {
        length = (size_t)(in.end - in.at) < sizeof out ? (size_t)(in.end - in.at) : sizeof out;
        memcpy(out, in.at, length);
    } else {
        length = requests(&in, answers.checksum, out);
    }
    if (!(how & CLOSED))
        gm_source_open(source);
    serve(source, how, ends[1], out, length);
    wanted = asked(answers.guest.memory, out, length, answers.checksum, &all);
    must(answers.pages <= wanted + FUZZ_PAGES);
    must(answers.pages >= wanted || how & (CLOSED | STOP) || !all);
    must(answers.beats <= (how & BEAT ? 1 : 0));
    gm_source_free(source);
    close(ends[0]);
    close(ends[1]);
    return 0;
}
