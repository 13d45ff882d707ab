#ifndef GMEMD_VMM_OPTIONS_H
#define GMEMD_VMM_OPTIONS_H

#include "guest.h"

/* The most that one datagram of the hand-off has to describe, and the daemon has to watch. */
enum { OPTIONS_REGIONS = 64 };

/* TMPFS is one that brings memory in as large folios. */
enum backing { BACKING_MEMFD, BACKING_TMPFS, BACKING_HUGETLB, BACKING_GUEST_MEMFD, BACKING_MIXED };
/* What KVM takes pages from: the mapping, or the guest_memfd itself. */
enum slot { SLOT_PLAIN, SLOT_GUEST_MEMFD };
enum guest_kind { GUEST_KVM, GUEST_THREADS };

struct options {
    bool destination;
    uint64_t memory;
    unsigned vcpus;
    unsigned regions;
    enum backing backing;
    enum slot slot;
    bool no_direct_map;
    bool prefault;
    enum guest_kind guest;
    struct guest_workload workload;
    const char *listen;
    const char *gmemd;
    const char *migration;
};

/* Parses the command line; ends the process on what it cannot understand, and after --help. */
struct options options_parse(int argc, char **argv);

const char *options_guest_name(enum guest_kind guest);
const char *options_backing_name(enum backing backing);

#endif
