/*
 * KVM userfault: vCPUs that leave KVM_RUN for a page that is not there yet. Each asks the daemon and
 * sleeps; one thread takes the answers of all. docs/handoff.md has the protocol.
 */
#ifndef GMEMD_VMM_USERFAULT_H
#define GMEMD_VMM_USERFAULT_H

#include <pthread.h>
#include <stdbool.h>

#include "guest.h"
#include "memory.h"

struct vcpu;

/* What a vCPU waits for. */
struct ask {
    bool open;
    uint64_t gpa;
    uint32_t pages; /* of the answer: so many are in place from there on */
    pthread_cond_t answered;
};

struct userfault {
    int socket; /* ours of the pair; the daemon's end is closed once it has it */
    int daemons;
    bool prefault;
    bool done; /* everything is in place: nobody asks any more */
    pthread_mutex_t lock;
    struct ask ask[GUEST_VCPUS];
    uint64_t asked, prefaulted; /* requests, and pages mapped ahead */
};

/* Makes the bitmap of every region, all bits set, the sockets, and the thread that takes answers. */
void userfault_create(struct userfault *userfault, struct memory *memory,
                      const struct options *options, int kvm);

/* Closes the end that the daemon was sent: only the daemon, and who keeps things for it, has it now. */
void userfault_sent(struct userfault *userfault);

/* Asks for the page at `gpa`, and returns when it is there. On the vCPU's thread. */
void userfault_resolve(struct vcpu *vcpu, uint64_t gpa);

/* All pages are there, whatever was asked for and not answered. */
void userfault_done(struct userfault *userfault);

struct json;
/* Adds "vcpu_exits" for pages that were not there, and "prefaulted_pages". */
void userfault_report(struct userfault *userfault, struct json *json);

#endif
