#include "handoff.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "base.h"
#include "json.h"

static struct sockaddr_un address_of(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    if (strlen(path) >= sizeof(address.sun_path))
        fail(EX_USAGE, "\"%s\" is too long for the path of a socket", path);
    memcpy(address.sun_path, path, strlen(path));
    return address;
}

static int create_socket(void)
{
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

    if (fd < 0)
        fail(EX_OSERR, "a UNIX socket: %s", strerror(errno));
    return fd;
}

int handoff_listen(const char *path)
{
    struct sockaddr_un address = address_of(path);
    int fd = create_socket();
    struct stat status;

    if (lstat(path, &status) == 0 && S_ISSOCK(status.st_mode))
        unlink(path); /* of one who listened before */
    if (bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(fd, 8) < 0)
        fail(EX_CANTCREAT, "listening on %s: %s", path, strerror(errno));
    return fd;
}

int handoff_connect(const char *path)
{
    struct sockaddr_un address = address_of(path);
    int fd = create_socket();

    if (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
        fail(EX_UNAVAILABLE, "connecting to gmemd at %s: %s", path, strerror(errno));
    return fd;
}

bool handoff_send(int socket, char *text, const int *fds, unsigned count)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(HANDOFF_FDS * sizeof(int))];
    } control = {0};
    struct iovec body = {.iov_base = text, .iov_len = strlen(text)};
    struct msghdr header = {.msg_iov = &body, .msg_iovlen = 1};
    ssize_t sent;

    if (count) {
        size_t size = count * sizeof(int);

        control.align = (struct cmsghdr){
            .cmsg_len = CMSG_LEN(size), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(&control.align), fds, size);
        header.msg_control = &control;
        header.msg_controllen = CMSG_SPACE(size);
    }
    sent = sendmsg(socket, &header, MSG_NOSIGNAL);
    if (sent < 0 && errno != EPIPE && errno != ECONNRESET)
        fail(EX_IOERR, "sending %zu bytes and %u descriptors: %s", body.iov_len, count,
             strerror(errno));
    free(text);
    return sent >= 0;
}

static void take_descriptors(struct msghdr *header, struct message *ret)
{
    for (struct cmsghdr *part = CMSG_FIRSTHDR(header); part; part = CMSG_NXTHDR(header, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
            continue;
        ret->fds = (unsigned)((part->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(ret->fd, CMSG_DATA(part), ret->fds * sizeof(int));
    }
}

const char *handoff_receive(int socket, struct message *ret)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(HANDOFF_FDS * sizeof(int))];
    } control;
    struct iovec body = {.iov_base = ret->text, .iov_len = HANDOFF_TEXT};
    struct msghdr header = {
        .msg_iov = &body,
        .msg_iovlen = 1,
        .msg_control = &control,
        .msg_controllen = sizeof(control),
    };
    ssize_t size = recvmsg(socket, &header, MSG_CMSG_CLOEXEC);

    ret->fds = 0;
    if (size < 0)
        return strerror(errno);
    take_descriptors(&header, ret);
    ret->text[size] = '\0';
    if (size == 0)
        return "it closed the connection";
    if (header.msg_flags & (MSG_TRUNC | MSG_CTRUNC))
        return "a message is larger than the protocol allows";
    if (strlen(ret->text) != (size_t)size || !json_is_object(ret->text))
        return "a message is not a JSON object";
    return NULL;
}

int message_take_fd(struct message *message, const char *key)
{
    uint64_t index;
    int fd;

    if (!json_get_number(message->text, key, &index) || index >= message->fds)
        return -1;
    fd = message->fd[index];
    message->fd[index] = -1;
    return fd;
}

void message_close(struct message *message)
{
    for (unsigned i = 0; i < message->fds; i++)
        close_cleanup(&message->fd[i]);
    message->fds = 0;
}

void handoff_regions(struct json *json, const struct memory *memory, const unsigned *uffd)
{
    json_open(json, "regions", '[');
    for (unsigned i = 0; i < memory->regions; i++) {
        const struct region *region = &memory->region[i];

        json_open(json, NULL, '{');
        json_number(json, "file", region->file);
        json_number(json, "offset", region->offset);
        json_number(json, "size", region->size);
        json_number(json, "page_size", region->page_size);
        json_number(json, "gpa", region->gpa);
        if (uffd) {
            json_number(json, "hva", (uintptr_t)memory->base + region->gpa);
            json_number(json, "uffd", *uffd);
        }
        if (uffd && memory->bitmaps) {
            json_number(json, "bitmap", *uffd + 1);
            json_number(json, "bitmap_offset", region->bitmap_offset);
        }
        json_close(json, '}');
    }
    json_close(json, ']');
}
