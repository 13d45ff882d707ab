/* The sending end of a page lane: pages of the memory file in, frames out. */
#ifndef GM_SENDER_H
#define GM_SENDER_H

#include "frame.h"
#include "problem.h"
#include "source.h"
#include "stream.h"

#include <stdint.h>
#include <sys/uio.h>

struct gm_sender {
    struct gm_source *source;
    struct gm_stream stream;
    int checksum;
    unsigned char *data; /* content of the pages in `vector` */
    size_t capacity, used;
    unsigned frames, vectors, sent; /* vectors before `sent` have gone */
    unsigned char headers[2 * GM_FRAME_PAGES][GM_HEADER_BYTES];
    struct iovec vector[4 * GM_FRAME_PAGES];
};

int gm_sender_init(struct gm_sender *s, struct gm_source *source, unsigned lane, int socket, struct gm_tls *tls,
                   int checksum, struct gm_problem *ret);
void gm_sender_deinit(struct gm_sender *s);

/* Whether `count` more pages of the region fit before a flush. */
bool gm_sender_fits(const struct gm_sender *s, const struct gm_region *r, unsigned count);

/* Whether to queue another frame, of any region, before a flush: pages that lie apart go together all the same. */
bool gm_sender_takes_more(const struct gm_sender *s);

/* Reads the pages and queues frames for them: zero pages as such. */
int gm_sender_add(struct gm_sender *s, const struct gm_region *r, uint64_t first, unsigned count,
                  struct gm_problem *ret);
void gm_sender_beat(struct gm_sender *s);

/* Returns 1 if some is left because the socket is full, 0 if none, -1 when the lane ended. */
int gm_sender_flush(struct gm_sender *s, struct gm_problem *ret);

static inline bool gm_sender_empty(const struct gm_sender *s)
{
    return s->sent == s->vectors;
}

#endif
