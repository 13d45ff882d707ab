/*
 * Threads, or a vCPU, that touch guest memory and time the touches that have to wait. The floor and the guest of gmemd
 * are measured by this same code.
 */
#ifndef GMEMD_BENCH_TOUCH_H
#define GMEMD_BENCH_TOUCH_H

#include <pthread.h>

#include "../vmm/memory.h"
#include "arguments.h"
#include "samples.h"
#include "vcpu.h"

enum { TOUCH_THREADS = 64 };

struct touch;

struct touch_thread {
    struct touch *touch;
    unsigned id;
    pthread_t thread;
    uint64_t begin_ns, end_ns, touches, sleeps;
    struct samples waits;
    struct samples stamps; /* pairs, as in gmemd/stages.py */
};

struct touch {
    const struct arguments *arguments;
    const struct memory *memory;
    uint32_t pages;
    struct bench_vcpu *vcpu; /* that touches in place of the threads */
    bool stop; /* set atomically: end after the next touch */
    pthread_barrier_t begin;
    struct touch_thread thread[TOUCH_THREADS];
};

/* Creates the threads, which wait for touch_begin. */
void touch_create(struct touch *touch, const struct arguments *arguments, const struct memory *memory);
void touch_begin(struct touch *touch);
/* Returns when every thread has made its touches; with `stop`, as soon as each is at its next. */
void touch_join(struct touch *touch, bool stop);
/* Writes down when each touch that waited began and ended, if that was asked for. */
void touch_write_stages(const struct touch *touch);
/* Adds what was measured to an object. Ends the process if content was wrong. */
void touch_report(const struct touch *touch, struct json *json);

#endif
