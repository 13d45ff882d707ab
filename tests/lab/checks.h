/*
 * What gmemd counts on in the kernel, asked of the kernel alone.
 *
 * A check is a function without arguments. It returns, or ends the process: EXIT_FAILURE and what was wrong,
 * or EXIT_SKIP and what this kernel lacks.
 */
#ifndef CHECKS_H
#define CHECKS_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "uapi.h"

#define EXIT_SKIP 77
#define PAGE ((size_t)4096)

#define END(status, ...)                                                                       \
    do {                                                                                       \
        fprintf(stderr, "%s:%d: ", __FILE__, __LINE__);                                        \
        fprintf(stderr, __VA_ARGS__);                                                          \
        fputc('\n', stderr);                                                                   \
        exit(status);                                                                          \
    } while (0)
#define EXPECT(condition)                                                                      \
    do {                                                                                       \
        if (!(condition))                                                                      \
            END(EXIT_FAILURE, "not so: %s", #condition);                                       \
    } while (0)
#define DO(call)                                                                               \
    do {                                                                                       \
        if ((call) < 0)                                                                        \
            END(EXIT_FAILURE, "%s: %s", #call, strerror(errno));                               \
    } while (0)
#define EXPECT_ERRNO(number, call)                                                             \
    do {                                                                                       \
        errno = 0;                                                                             \
        if ((call) >= 0 || errno != (number))                                                  \
            END(EXIT_FAILURE, "%s: %s, not %s", #call, strerror(errno), strerror(number));     \
    } while (0)

/* A file that can be mapped, of a VM that lives as long as the process. */
int guest_memfd(size_t size, uint64_t more_flags);
int the_vm(void);
/* In real mode, its code segment at 0. */
int make_vcpu(struct kvm_run **run);
void *map_shared(int file, size_t size);
/* Seconds of a clock that only goes on. */
double now(void);
/* Writes `count` pages, each full of its number plus `seed`. */
void write_pages(int file, uint64_t first, uint64_t count, unsigned char seed);

void check_write_needs_the_flag(void);
void check_write_takes_whole_pages(void);
void check_write_is_what_the_mapping_shows(void);
void check_write_beats_memcpy(void);

void check_minor_stops_at_a_present_page(void);
void check_missing_stops_at_an_absent_page(void);
void check_minor_alone_stops_at_an_absent_page(void);
void check_write_and_continue(void);
void check_the_kernel_is_stopped_too(void);
void check_an_alias_fills_in_peace(void);
void check_continue_says_what_is_wrong(void);

void check_no_direct_map_is_written_once(void);
void check_no_direct_map_is_filled_by_the_mapping(void);
void check_no_direct_map_cannot_be_pinned(void);
void check_no_direct_map_begins_anew_after_a_punch(void);

void check_userfault_wants_a_bitmap(void);
void check_userfault_stops_a_vcpu(void);

void check_prefault_maps_ahead(void);

#endif
