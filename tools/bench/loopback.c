#include "loopback.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>

#include "../vmm/base.h"

void loopback_pair(int ends[2])
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr *any = (struct sockaddr *)&address;
    socklen_t size = sizeof(address);
    CLEANUP_CLOSE int listener = socket(AF_INET, SOCK_STREAM, 0);
    int one = 1;

    ends[0] = socket(AF_INET, SOCK_STREAM, 0);
    if (listener < 0 || ends[0] < 0 || bind(listener, any, size) < 0 || listen(listener, 1) < 0 ||
        getsockname(listener, any, &size) < 0 || connect(ends[0], any, size) < 0)
        fail(EX_OSERR, "TCP over loopback: %s", strerror(errno));
    ends[1] = accept(listener, NULL, NULL);
    for (int i = 0; i < 2; i++)
        if (setsockopt(ends[i], IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)) < 0)
            fail(EX_OSERR, "TCP_NODELAY: %s", strerror(errno));
}

void loopback_send(int sock, const void *data, size_t size)
{
    for (size_t sent = 0; sent < size;) {
        ssize_t put = send(sock, (const char *)data + sent, size - sent, MSG_NOSIGNAL);

        if (put < 0)
            fail(EX_IOERR, "send: %s", strerror(errno));
        sent += (size_t)put;
    }
}

pid_t loopback_fork(void)
{
    pid_t parent = getpid(), child = fork();

    if (child < 0)
        fail(EX_OSERR, "fork: %s", strerror(errno));
    if (child == 0 && (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || getppid() != parent))
        _exit(EX_OSERR);
    return child;
}

const uint8_t *loopback_map(const char *path, uint64_t size)
{
    CLEANUP_CLOSE int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    const uint8_t *mapping;

    if (file < 0)
        fail(EX_NOINPUT, "--source %s: %s", path ? path : "", strerror(errno));
    mapping = mmap(NULL, size, PROT_READ, MAP_SHARED | MAP_POPULATE, file, 0);
    if (mapping == MAP_FAILED)
        fail(EX_OSERR, "--source %s: %s", path, strerror(errno));
    return mapping;
}
