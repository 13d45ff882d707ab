/* Scope-bound resources, in place of goto ladders. */
#ifndef GM_CLEANUP_H
#define GM_CLEANUP_H

#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

static inline void gm_close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
}

static inline void gm_free_pointer(void *pointer)
{
    free(*(void **)pointer);
}

static inline void gm_unlock(pthread_mutex_t **lock)
{
    pthread_mutex_unlock(*lock);
}

static inline pthread_mutex_t *gm_lock(pthread_mutex_t *lock)
{
    pthread_mutex_lock(lock);
    return lock;
}

#define gm_auto_fd __attribute__((cleanup(gm_close_fd))) int
#define gm_auto_free __attribute__((cleanup(gm_free_pointer)))
/* Holds `lock` until the end of the scope. */
#define GM_LOCKED(lock)                                                                        \
    __attribute__((cleanup(gm_unlock), unused)) pthread_mutex_t *gm_held = gm_lock(lock)

#endif
