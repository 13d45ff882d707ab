/* write() on guest_memfd. */
#include "checks.h"

#include <sys/mman.h>

#define MEASURED ((size_t)64 << 20)
#define CHUNK ((size_t)1 << 20)
#define ROUNDS 3

void check_write_needs_the_flag(void)
{
    static const unsigned char page[4096];

    close(guest_memfd(PAGE, GUEST_MEMFD_FLAG_WRITE));
    EXPECT(pwrite(guest_memfd(PAGE, 0), page, PAGE, 0) < 0);
}

void check_write_takes_whole_pages(void)
{
    static const unsigned char pages[2 * 4096];
    int file = guest_memfd(4 * PAGE, GUEST_MEMFD_FLAG_WRITE);

    EXPECT_ERRNO(EINVAL, pwrite(file, pages, PAGE, 1));
    EXPECT_ERRNO(EINVAL, pwrite(file, pages, PAGE, 512));
    EXPECT_ERRNO(EINVAL, pwrite(file, pages, PAGE - 1, 0));
    EXPECT_ERRNO(EINVAL, pwrite(file, pages, PAGE + 1, 0));
    EXPECT_ERRNO(EINVAL, pwrite(file, pages, PAGE, 4 * (off_t)PAGE));
    EXPECT(pwrite(file, pages, 2 * PAGE, (off_t)PAGE) == 2 * (ssize_t)PAGE);
    EXPECT(pwrite(file, pages, 2 * PAGE, 3 * (off_t)PAGE) == (ssize_t)PAGE);
}

void check_write_is_what_the_mapping_shows(void)
{
    int file = guest_memfd(4 * PAGE, GUEST_MEMFD_FLAG_WRITE);
    const unsigned char *seen = map_shared(file, 4 * PAGE);

    write_pages(file, 1, 2, 7);
    EXPECT(seen[0] == 0 && seen[4 * PAGE - 1] == 0);
    EXPECT(seen[PAGE] == 8 && seen[2 * PAGE - 1] == 8);
    EXPECT(seen[2 * PAGE] == 9 && seen[3 * PAGE - 1] == 9);
    write_pages(file, 1, 1, 70);
    EXPECT(seen[PAGE] == 71 && seen[2 * PAGE - 1] == 71);
}

static double seconds_by_write(const unsigned char *content)
{
    int file = guest_memfd(MEASURED, GUEST_MEMFD_FLAG_WRITE);
    double start = now(), taken;

    for (size_t done = 0; done < MEASURED; done += CHUNK)
        EXPECT(pwrite(file, content + done, CHUNK, (off_t)done) == (ssize_t)CHUNK);
    taken = now() - start;
    close(file);
    return taken;
}

static double seconds_by_memcpy(const unsigned char *content)
{
    int file = guest_memfd(MEASURED, GUEST_MEMFD_FLAG_WRITE);
    double start = now(), taken;
    unsigned char *mapping = map_shared(file, MEASURED);

    for (size_t done = 0; done < MEASURED; done += CHUNK)
        memcpy(mapping + done, content + done, CHUNK);
    DO(munmap(mapping, MEASURED));
    taken = now() - start;
    close(file);
    return taken;
}

/* The best of some rounds, one after the other, as a busy host slows whichever it hits. */
void check_write_beats_memcpy(void)
{
    unsigned char *content = malloc(MEASURED);
    double write = 1e9, copy = 1e9;

    EXPECT(content != NULL);
    memset(content, 0x5a, MEASURED);
    for (int round = 0; round < ROUNDS; round++) {
        double w = seconds_by_write(content), c = seconds_by_memcpy(content);

        write = w < write ? w : write;
        copy = c < copy ? c : copy;
    }
    free(content);
    printf("write_over_memcpy %.2f write_us %.0f memcpy_us %.0f bytes %zu\n", write / copy, write * 1e6,
           copy * 1e6, MEASURED);
    EXPECT(write < copy);
}
