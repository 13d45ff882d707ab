/* What the kernel takes for putting the same bytes into a fresh memory file, in one thread and without any network. */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "../vmm/base.h"
#include "../vmm/json.h"
#include "../vmm/memory.h"
#include "arguments.h"
#include "loopback.h"
#include "pattern.h"

enum { FRAME = 64 * PATTERN_PAGE };

static void write_by(const struct memory *memory, const uint8_t *content, size_t piece)
{
    for (uint64_t at = 0; at < memory->size; at += piece)
        if (pwrite(memory->file[0], content + at, piece, (off_t)at) != (ssize_t)piece)
            fail(EX_OSERR, "pwrite: %s", strerror(errno));
}

static void write_page(const struct memory *memory, const uint8_t *content)
{
    write_by(memory, content, PATTERN_PAGE);
}

static void write_frame(const struct memory *memory, const uint8_t *content)
{
    write_by(memory, content, FRAME);
}

static void copy(const struct memory *memory, const uint8_t *content)
{
    memcpy(memory->base, content, memory->size);
}

static void populate_and_copy(const struct memory *memory, const uint8_t *content)
{
    for (uint64_t at = 0; at < memory->size; at += FRAME) {
        if (madvise(memory->base + at, FRAME, MADV_POPULATE_WRITE) < 0)
            fail(EX_OSERR, "MADV_POPULATE_WRITE: %s", strerror(errno));
        memcpy(memory->base + at, content + at, FRAME);
    }
}

static void measure(struct json *json, const struct arguments *a, const uint8_t *content, const char *name,
                    void (*fill)(const struct memory *, const uint8_t *))
{
    struct memory memory = memory_create(&a->machine, -1);
    uint64_t begin = now_ns();

    fill(&memory, content);
    json_fraction(json, name, (double)(now_ns() - begin) / 1e3);
    munmap(memory.base, memory.size);
    close(memory.file[0]);
}

int main(int argc, char **argv)
{
    struct arguments a = arguments_parse(argc, argv);
    const uint8_t *content;
    struct json json;

    if (a.machine.memory % FRAME)
        fail(EX_USAGE, "--memory: a multiple of %d", FRAME);
    content = loopback_map(a.source, a.machine.memory);
    json_begin(&json);
    json_string(&json, "event", "cost");
    json_number(&json, "bytes", a.machine.memory);
    measure(&json, &a, content, "pwrite_page_us", write_page);
    measure(&json, &a, content, "pwrite_frame_us", write_frame);
    measure(&json, &a, content, "memcpy_us", copy);
    measure(&json, &a, content, "populate_memcpy_us", populate_and_copy);
    json_print(&json);
    return 0;
}
