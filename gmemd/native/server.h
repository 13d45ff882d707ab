/* The urgent lane at the source: requests in, pages out, in the thread that reads them. */
#ifndef GM_SERVER_H
#define GM_SERVER_H

#include "problem.h"
#include "source.h"
#include "tls.h"

#include <stdint.h>

/* python */
struct gm_server;

/*
 * `socket` stays the caller's, and is non-blocking, and so does `tls`, the session on it, or NULL. Polls for at most `poll_us` before it sleeps. Sends at most `ahead` pages behind one that
 * was asked for to a guest that walks through memory.
 */
struct gm_server *gm_server_new(struct gm_source *s, int socket, struct gm_tls *tls, int checksum, uint32_t poll_us,
                                uint32_t ahead, struct gm_problem *ret);
void gm_server_free(struct gm_server *server);
/* Answers requests until gm_server_stop() (0), or until the lane ends or a page cannot be read (-1). Call it in a thread of its own. */
int gm_server_run(struct gm_server *server, struct gm_problem *ret);
void gm_server_stop(struct gm_server *server);
/* Has the thread send a beat, when it has nothing else to send. */
void gm_server_beat(struct gm_server *server);
/* When something last came, CLOCK_MONOTONIC. */
uint64_t gm_server_heard_ns(const struct gm_server *server);
/* end python */

#endif
