/* The sockets of docs/handoff.md: one datagram, one message, with its descriptors. */
#ifndef GMEMD_VMM_HANDOFF_H
#define GMEMD_VMM_HANDOFF_H

#include <stdbool.h>

#include "memory.h"

/* From docs/handoff.md. */
enum { HANDOFF_TEXT = 128 << 10, HANDOFF_FDS = 64 };

struct message {
    char text[HANDOFF_TEXT + 1];
    int fd[HANDOFF_FDS]; /* taken ones are replaced by -1 */
    unsigned fds;
};

int handoff_listen(const char *path);
int handoff_connect(const char *path);

/* False if nobody is there to receive. The text is freed. */
bool handoff_send(int socket, char *text, const int *fds, unsigned count);

/* NULL if a message came; otherwise why none did. */
const char *handoff_receive(int socket, struct message *ret);
/* The descriptor whose index the member `key` gives, now the caller's; -1 if there is none. */
int message_take_fd(struct message *message, const char *key);
/* Closes the descriptors that nobody took. */
void message_close(struct message *message);

struct json;
/*
 * Adds "regions". A destination says where they are mapped, and the index of the `uffd`; that of
 * the userfault bitmaps, where there are any, is the next.
 */
void handoff_regions(struct json *json, const struct memory *memory, const unsigned *uffd);

#endif
