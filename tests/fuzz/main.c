/* Drives a target without libFuzzer: every file of a corpus, then so many seeded mutations of them. usage: TARGET COUNT SEED FILE… */
#include "fuzz.h"

#include <string.h>

enum { LARGEST = 16384, MOST_FILES = 1024 };

static struct {
    uint8_t *data;
    size_t size;
} corpus[MOST_FILES];

static uint64_t state;

static uint64_t next(uint64_t limit)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (state >> 11) % limit;
}

static void load(unsigned index, const char *path)
{
    FILE *file = fopen(path, "rb");

    must(file && index < MOST_FILES);
    corpus[index].data = malloc(LARGEST);
    must(corpus[index].data);
    corpus[index].size = fread(corpus[index].data, 1, LARGEST, file);
    fclose(file);
}

/* One change, at a random place. Returns the new size. */
static size_t change(uint8_t *data, size_t size)
{
    static const uint64_t edges[] = {0, 1, 0x7f, 0x80, 0xff, 0xffff, 0x10000, 0x7fffffff, 0xffffffff, INT64_MAX, UINT64_MAX};
    size_t at = size ? next(size) : 0, run = next(16) + 1;

    switch (size < 16 ? 4 : next(5)) {
    case 0:
        data[at] ^= (uint8_t)(1 << next(8));
        return size;
    case 1:
        data[at] = (uint8_t)next(256);
        return size;
    case 2:
        memcpy(data + next(size - 8), &edges[next(sizeof edges / sizeof *edges)], 1 << next(4));
        return size;
    case 3:
        run = run < size - at ? run : size - at;
        memmove(data + at, data + at + run, size - at - run);
        return size - run;
    default:
        if (size + run > LARGEST)
            return size;
        memmove(data + at + run, data + at, size - at);
        for (size_t i = 0; i < run; i++)
            data[at + i] = (uint8_t)next(256);
        return size + run;
    }
}

/* What an input needs to be exactly as long as its allocation, so that the address sanitizer sees the byte behind it. */
static void run(const uint8_t *data, size_t size)
{
    uint8_t *exact = malloc(size ? size : 1);

    must(exact);
    memcpy(exact, data, size);
    LLVMFuzzerTestOneInput(exact, size);
    free(exact);
}

int main(int argc, char **argv)
{
    static uint8_t data[LARGEST];
    unsigned files = argc > 3 ? (unsigned)argc - 3 : 0;
    unsigned long count = argc > 3 ? strtoul(argv[1], NULL, 10) : 0;

    must(files);
    state = strtoul(argv[2], NULL, 10) | 1;
    for (unsigned i = 0; i < files; i++) {
        load(i, argv[3 + i]);
        run(corpus[i].data, corpus[i].size);
    }
    for (unsigned long i = 0; i < count; i++) {
        unsigned parent = (unsigned)next(files);
        size_t size = corpus[parent].size;

        memcpy(data, corpus[parent].data, size);
        for (uint64_t left = next(8) + 1; left; left--)
            size = change(data, size);
        run(data, size);
    }
    printf("%lu\n", files + count);
    return 0;
}
