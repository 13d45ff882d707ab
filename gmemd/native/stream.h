/*
 * The connection of one page lane, as bytes. Nothing else reads from or writes to a lane's socket; who waits for it does so by
 * `socket`, in poll or epoll.
 */
#ifndef GM_STREAM_H
#define GM_STREAM_H

#include "problem.h"
#include "tls.h"

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

struct gm_stream {
    int socket;
    struct gm_tls *tls;        /* or NULL: plain text */
    char name[32];             /* of the lane */
    const char *peer;          /* who is at the other end */
    _Atomic uint64_t heard_ns; /* when something was last read, CLOCK_MONOTONIC */
};

/* `socket` stays the caller's, and is non-blocking; so does `tls`, the session on it, if there is one. Lane 0 is the urgent one. */
void gm_stream_init(struct gm_stream *s, unsigned lane, int socket, struct gm_tls *tls, const char *peer);

/* Returns how many bytes came: 0 if none are there, -EPIPE if the peer has closed, or another -errno. Call it until it returns 0, since
 * only then does the socket tell when there is more. */
ssize_t gm_stream_read(struct gm_stream *s, void *to, size_t most);

/* Returns how many bytes were taken: 0 if there is no room, and then the same must come first the next time; or -errno. */
ssize_t gm_stream_write(struct gm_stream *s, const struct iovec *pieces, size_t count);

/* At most so many bytes a second from now on, evenly; 0 for no limit. */
void gm_stream_pace(const struct gm_stream *s, uint64_t bytes_per_s);

/* What the way there and back takes now, and has taken at least, in µs; 0 if the socket cannot tell. */
struct gm_round_trip {
    uint32_t now_us, least_us;
};
struct gm_round_trip gm_stream_round_trip(const struct gm_stream *s);

/* When something last came, CLOCK_MONOTONIC: was read, or has come as far as the socket, which not everybody reads at once. */
uint64_t gm_stream_heard_ns(const struct gm_stream *s);

/* Says how it ended, as gm_blame() does. `where` is empty, or where in the talk that was. */
int gm_stream_ended(const struct gm_stream *s, ssize_t error, const char *where, struct gm_problem *ret);

#endif
