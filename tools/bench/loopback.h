/* Two processes and TCP between them. */
#ifndef GMEMD_BENCH_LOOPBACK_H
#define GMEMD_BENCH_LOOPBACK_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Two ends of one connection over 127.0.0.1, without delay. */
void loopback_pair(int ends[2]);
void loopback_send(int sock, const void *data, size_t size);
/* A child that ends when its parent does. */
pid_t loopback_fork(void);
/* The first `size` bytes of a file, mapped to be read, all of them present. */
const uint8_t *loopback_map(const char *path, uint64_t size);

#endif
