/* What the pager does for one migration: faults in, requests out. */
#ifndef GM_FAULTS_H
#define GM_FAULTS_H

#include "destination.h"
#include "lane.h"

#include <stdbool.h>

/* A request for every wait there can be, the pages of damaged frames, and beats. */
enum { GM_OUT_BYTES = (GM_MAX_WAITS + GM_MAX_ASKS + 16) * GM_HEADER_BYTES };

struct gm_port {
    struct gm_port *next;
    struct gm_destination *destination;
    struct gm_lane *urgent; /* or NULL */
    bool busy;              /* the urgent lane has more, of which epoll does not know if the lane has read it ahead */
    uint64_t id;
    bool full;   /* as many waits as there can be: its userfaultfds are not watched */
    bool again;  /* something could not be mapped while events waited to be read */
    bool missed; /* faults were read for which there was no room: woken, they come again */
    bool deaf;   /* the VMM's fault socket is watched for room alone */
    bool unsaid; /* a request found no room in `out`: once that is empty, everything is asked for again */
    size_t out_start, out_end;
    unsigned char out[GM_OUT_BYTES];
};

/* Reads what one userfaultfd has: notes removals, answers faults on received pages, queues requests for the rest. Returns how
 * many messages, or -1 with a problem. */
int gm_faults_read(struct gm_port *port, int uffd, struct gm_problem *ret);

/* Takes the requests of vCPUs. Returns how many, or -1 with a problem: the VMM's fault socket cannot be read any more. */
int gm_faults_read_vcpus(struct gm_port *port, struct gm_problem *ret);

/* Continues every wait whose page is received; sets port->again if one has to be tried again. */
void gm_faults_sweep(struct gm_port *port);

/* Queues requests for all that is waited for: on a new urgent lane, or because pages could not be put in place. */
void gm_faults_ask_all(struct gm_port *port);

/* Queues requests for pages of damaged frames; without a lane to ask on, or room, that waits for it. */
void gm_faults_ask_damaged(struct gm_port *port);

void gm_faults_queue(struct gm_port *port, uint8_t kind, uint32_t region, uint64_t first, uint32_t count);

/* Sends what is queued. Returns 1 if some is left because the socket is full, 0 if none, -1 when the lane ended. */
int gm_faults_send(struct gm_port *port, struct gm_problem *ret);

#endif
