/* Copies to and from a mapping whose file somebody else may truncate meanwhile. */
#ifndef GM_GUARD_H
#define GM_GUARD_H

#include <stddef.h>

/* Both return 0, or -EFAULT where memcpy would have died of SIGBUS. */
int gm_guarded_store(void *mapping, const void *from, size_t length);
int gm_guarded_load(void *to, const void *mapping, size_t length);

#endif
