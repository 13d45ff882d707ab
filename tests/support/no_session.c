/* Loaded before OpenSSL: no TLS session can be made, as if there were no memory, while there is a file of the name in NO_SESSION. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

void *SSL_new(void *context);

void *SSL_new(void *context)
{
    const char *path = getenv("NO_SESSION");
    void *(*real)(void *) = (void *(*)(void *))dlsym(RTLD_NEXT, "SSL_new");

    return path && !access(path, F_OK) ? NULL : real(context);
}
