/* Guest memory as the host has it: files, regions in them, all mapped side by side. */
#ifndef GMEMD_VMM_MEMORY_H
#define GMEMD_VMM_MEMORY_H

#include "options.h"

struct region {
    enum backing backing;
    unsigned file; /* index into the files */
    uint64_t offset;
    uint64_t size;
    uint64_t page_size;
    uint64_t gpa;
    uint64_t bitmap_offset; /* of its userfault bitmap */
};

struct memory {
    uint64_t size;
    uint8_t *base; /* guest physical address 0 */
    unsigned regions;
    struct region region[OPTIONS_REGIONS];
    unsigned files;
    int file[OPTIONS_REGIONS];
    uint8_t *bitmaps; /* KVM userfault: where they are mapped, and their memfd; NULL without */
    int bitmap_file;
};

/* Creates and maps the files, touches nothing. `vm` makes guest_memfds; -1 if there is none. */
struct memory memory_create(const struct options *options, int vm);

#endif
