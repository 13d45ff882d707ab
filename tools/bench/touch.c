/*
 * Only touches that waited are samples. A touch that takes long may have been preempted instead, or the kernel may have mapped by itself what
 * userfaultfd guards no more; the thread's count of sleeps tells them apart.
 */
#include "touch.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/resource.h>

#include "../vmm/base.h"
#include "pattern.h"

/* Half of what the quickest fault takes; more than a touch that finds its page takes. */
static const uint64_t SUSPECT_NS = 1000;

/* Samples of a thread that goes on until it is stopped: at most one a fault. */
static const size_t ENDLESS = 1u << 20;

/* The guest's own stages of a fault, in the words of gmemd/native/stages.h. */
enum { STAGE_TOUCHED = 1, STAGE_RUNNING = 9 };

static uint64_t sleeps_so_far(void)
{
    struct rusage usage;

    getrusage(RUSAGE_THREAD, &usage);
    return (uint64_t)usage.ru_nvcsw;
}

static void stamp(struct touch_thread *thread, uint64_t at_ns, uint64_t stage, uint64_t page)
{
    samples_add(&thread->stamps, at_ns);
    samples_add(&thread->stamps, stage | page << 24);
}

static void touch_page(struct touch_thread *thread, uint32_t page)
{
    const struct memory *memory = thread->touch->memory;
    uint64_t offset = page * memory->region[0].page_size;
    const volatile uint64_t *word = (const volatile uint64_t *)(memory->base + offset);
    uint64_t before = now_ns(), value = *word, after = now_ns(), took = after - before, sleeps;

    if (value != offset / PATTERN_PAGE + 1)
        fail(EX_DATAERR, "page %u holds %llu", page, (unsigned long long)value);
    thread->touches++;
    if (took < SUSPECT_NS)
        return;
    sleeps = sleeps_so_far();
    if (sleeps != thread->sleeps) {
        samples_add(&thread->waits, took);
        stamp(thread, before, STAGE_TOUCHED, page);
        stamp(thread, after, STAGE_RUNNING, page);
    }
    thread->sleeps = sleeps;
}

static void think(uint64_t ns)
{
    uint64_t until = now_ns() + ns;

    while (now_ns() < until)
        ;
}

static void touch_pages(struct touch_thread *thread)
{
    const struct touch *touch = thread->touch;
    const struct arguments *a = touch->arguments;
    uint32_t pages = touch->pages, place = (uint32_t)((uint64_t)pages * thread->id / a->threads);
    uint64_t most = a->touches ? a->touches / a->threads : UINT64_MAX;
    unsigned half = pattern_half(pages);

    thread->sleeps = sleeps_so_far();
    while (thread->touches < most && !__atomic_load_n(&touch->stop, __ATOMIC_RELAXED)) {
        touch_page(thread, a->random ? pattern_shuffled(place, pages, half) : place);
        place = (uint32_t)(((uint64_t)place + a->stride) % pages);
        if (a->think_ns)
            think(a->think_ns);
    }
}

static void *run(void *argument)
{
    struct touch_thread *thread = argument;
    struct touch *touch = thread->touch;

    pthread_barrier_wait(&touch->begin);
    thread->begin_ns = now_ns();
    if (touch->vcpu)
        vcpu_run(touch->vcpu);
    else
        touch_pages(thread);
    thread->end_ns = now_ns();
    if (touch->vcpu)
        thread->touches = vcpu_touches(touch->vcpu, &thread->waits);
    return NULL;
}

void touch_create(struct touch *touch, const struct arguments *arguments, const struct memory *memory)
{
    uint64_t pages = memory->size / memory->region[0].page_size;

    if (arguments->threads < 1 || arguments->threads > TOUCH_THREADS)
        fail(EX_USAGE, "--threads %u: 1 to %u", arguments->threads, TOUCH_THREADS);
    if (pages > UINT32_MAX)
        fail(EX_USAGE, "--memory: %llu pages are too many", (unsigned long long)pages);
    if (arguments->touches > pages)
        fail(EX_USAGE, "--touches: the memory has only %llu pages", (unsigned long long)pages);
    if (arguments->image && arguments->threads > 1)
        fail(EX_USAGE, "--vcpu: there is only one");
    *touch = (struct touch){.arguments = arguments, .memory = memory, .pages = (uint32_t)pages};
    if (arguments->image)
        touch->vcpu = vcpu_create(arguments->image, memory);
    pthread_barrier_init(&touch->begin, NULL, arguments->threads + 1);
    for (unsigned i = 0; i < arguments->threads; i++) {
        struct touch_thread *thread = &touch->thread[i];
        int error;

        thread->touch = touch;
        thread->id = i;
        thread->waits = samples_create(arguments->touches ? arguments->touches : ENDLESS);
        if (arguments->stages)
            thread->stamps = samples_create(4 * thread->waits.room);
        error = pthread_create(&thread->thread, NULL, run, thread);
        if (error)
            fail(EX_OSERR, "thread %u: %s", i, strerror(error));
    }
}

void touch_begin(struct touch *touch)
{
    pthread_barrier_wait(&touch->begin);
}

void touch_join(struct touch *touch, bool stop)
{
    __atomic_store_n(&touch->stop, stop, __ATOMIC_RELAXED);
    if (stop && touch->vcpu)
        vcpu_stop(touch->vcpu, touch->thread[0].thread);
    for (unsigned i = 0; i < touch->arguments->threads; i++)
        pthread_join(touch->thread[i].thread, NULL);
}

void touch_write_stages(const struct touch *touch)
{
    const char *path = touch->arguments->stages;
    struct {
        char magic[8];
        uint32_t version, stamps;
    } header = {.magic = "GMSTAGE\x1a", .version = 1};
    CLEANUP_CLOSE int file = path ? open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644) : -1;
    bool whole;

    if (!path)
        return;
    for (unsigned i = 0; i < touch->arguments->threads; i++)
        header.stamps += (uint32_t)(touch->thread[i].stamps.count / 2);
    whole = file >= 0 && write(file, &header, sizeof(header)) == sizeof(header);
    for (unsigned i = 0; whole && i < touch->arguments->threads; i++) {
        const struct samples *stamps = &touch->thread[i].stamps;
        ssize_t bytes = (ssize_t)(stamps->count * sizeof(*stamps->ns));

        whole = write(file, stamps->ns, (size_t)bytes) == bytes;
    }
    if (!whole)
        fail(EX_CANTCREAT, "--stages %s: %s", path, strerror(errno));
}

void touch_report(const struct touch *touch, struct json *json)
{
    uint64_t begin = UINT64_MAX, end = 0, touches = 0;
    size_t count = 0;
    struct samples all;
    double seconds;

    for (unsigned i = 0; i < touch->arguments->threads; i++)
        count += touch->thread[i].waits.count;
    all = samples_create(count + 1);
    for (unsigned i = 0; i < touch->arguments->threads; i++) {
        const struct touch_thread *thread = &touch->thread[i];

        begin = thread->begin_ns < begin ? thread->begin_ns : begin;
        end = thread->end_ns > end ? thread->end_ns : end;
        touches += thread->touches;
        for (size_t j = 0; j < thread->waits.count; j++)
            samples_add(&all, thread->waits.ns[j]);
    }
    seconds = (double)(end - begin) / 1e9;
    json_number(json, "threads", touch->arguments->threads);
    json_number(json, "touches", touches);
    json_number(json, "touching_us", (end - begin) / 1000);
    json_fraction(json, "faults_per_s", (double)count / seconds);
    samples_report(&all, json, "wait_us");
}
