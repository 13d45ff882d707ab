/* A thread that touches the arena's page once, and can always be let go. For probe*.c alone. */
#ifndef GM_PROBE_TOUCHER_H
#define GM_PROBE_TOUCHER_H

#include "probe_arena.h"

#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

enum gm_deed { GM_DEED_READ, GM_DEED_REMOVE };

struct gm_toucher {
    struct gm_arena *arena;
    enum gm_deed deed;
    int near; /* what the toucher read comes out here, and then an end of file */
    int far;
    bool runs;
    pthread_t thread;
    atomic_int tid;
    atomic_int error; /* how its touch failed */
};

#define GM_NO_TOUCHER {.near = -1, .far = -1}
#define gm_auto_toucher __attribute__((cleanup(gm_toucher_stop))) struct gm_toucher

/* The arena's userfaultfd is open and the page registered. */
struct gm_trial gm_toucher_start(struct gm_toucher *toucher, struct gm_arena *arena,
                                 enum gm_deed deed);

/* Takes the arena's userfaultfd away first, which ends whatever the toucher waits for. */
void gm_toucher_stop(struct gm_toucher *toucher);

/*
 * Waits until the toucher is trapped or done, and returns which of gm_probe_seen it was. A message
 * that came of it is in *message; one that is no page fault counts as GM_PROBE_SEEN_OTHER.
 */
int gm_toucher_await(const struct gm_toucher *toucher, struct uffd_msg *message);

#endif
