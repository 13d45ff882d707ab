/*
 * How fast memory can be carried over TCP at all: some connections, at one end a thread each that sends its part of
 * memory, at the other a thread each that receives and writes it into a memory file.
 */
#include <errno.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "../vmm/base.h"
#include "../vmm/memory.h"
#include "arguments.h"
#include "loopback.h"
#include "pattern.h"
#include "touch.h"

/* What a background frame of ours carries at most. */
enum { CHUNK = 64 * PATTERN_PAGE };

struct stream {
    pthread_t thread;
    int sock;
    int file;
    const uint8_t *content;
    uint64_t first, end; /* bytes */
};

static void *send_part(void *argument)
{
    const struct stream *s = argument;

    for (uint64_t at = s->first; at < s->end; at += CHUNK)
        loopback_send(s->sock, s->content + at, s->end - at < CHUNK ? s->end - at : CHUNK);
    return NULL;
}

static void *receive_part(void *argument)
{
    const struct stream *s = argument;
    CLEANUP_FREE uint8_t *buffer = allocate(1, CHUNK);

    for (uint64_t at = s->first; at < s->end;) {
        size_t most = s->end - at < CHUNK ? (size_t)(s->end - at) : CHUNK;
        ssize_t got = recv(s->sock, buffer, most, MSG_WAITALL);

        if (got != (ssize_t)most)
            fail(EX_IOERR, "recv: %s", got < 0 ? strerror(errno) : "ended early");
        if (pwrite(s->file, buffer, most, (off_t)at) != got)
            fail(EX_OSERR, "pwrite: %s", strerror(errno));
        at += most;
    }
    return NULL;
}

static void run(struct stream *stream, unsigned count, void *(*part)(void *))
{
    for (unsigned i = 0; i < count; i++)
        if (pthread_create(&stream[i].thread, NULL, part, &stream[i]))
            fail(EX_OSERR, "no thread for stream %u", i);
    for (unsigned i = 0; i < count; i++)
        pthread_join(stream[i].thread, NULL);
}

static double cpu_seconds(const struct rusage *usage)
{
    return (double)(usage->ru_utime.tv_sec + usage->ru_stime.tv_sec) +
           (double)(usage->ru_utime.tv_usec + usage->ru_stime.tv_usec) / 1e6;
}

static double cpu_seconds_here(void)
{
    struct rusage usage;

    getrusage(RUSAGE_SELF, &usage);
    return cpu_seconds(&usage);
}

int main(int argc, char **argv)
{
    struct arguments a = arguments_parse(argc, argv);
    struct memory memory = memory_create(&a.machine, -1);
    struct stream out[TOUCH_THREADS] = {0}, in[TOUCH_THREADS] = {0};
    uint64_t part = memory.size / a.threads / PATTERN_PAGE * PATTERN_PAGE, begin;
    struct rusage source;
    struct json json;
    double here;
    pid_t child;
    char first;

    if (a.threads < 1 || a.threads > TOUCH_THREADS)
        fail(EX_USAGE, "--threads %u: 1 to %u", a.threads, TOUCH_THREADS);
    for (unsigned i = 0; i < a.threads; i++) {
        int ends[2];

        loopback_pair(ends);
        in[i] = out[i] = (struct stream){
            .first = part * i,
            .end = i + 1 < a.threads ? part * (i + 1) : memory.size,
            .file = memory.file[0],
        };
        out[i].sock = ends[0];
        in[i].sock = ends[1];
    }
    child = loopback_fork();
    if (child == 0) {
        const uint8_t *content = loopback_map(a.source, memory.size);

        for (unsigned i = 0; i < a.threads; i++)
            out[i].content = content;
        run(out, a.threads, send_part);
        _exit(0);
    }
    if (recv(in[0].sock, &first, 1, MSG_PEEK) != 1) /* then the sender has mapped its content */
        fail(EX_IOERR, "the sender ended early");
    here = cpu_seconds_here();
    begin = now_ns();
    run(in, a.threads, receive_part);

    json_begin(&json);
    json_string(&json, "event", "stream");
    json_number(&json, "streams", a.threads);
    json_number(&json, "bytes", memory.size);
    json_number(&json, "duration_us", (now_ns() - begin) / 1000);
    json_fraction(&json, "destination_cpu_s", cpu_seconds_here() - here);
    if (wait4(child, NULL, 0, &source) != child)
        fail(EX_OSERR, "waiting for the sender: %s", strerror(errno));
    json_fraction(&json, "source_cpu_s", cpu_seconds(&source));
    json_print(&json);
    return 0;
}
