#include "userfault.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "base.h"
#include "json.h"
#include "machine.h"
#include "uapi.h"

/* Both ways, little-endian. Requests have no pages. */
struct datagram {
    uint32_t vcpu, pages;
    uint64_t gpa;
};

/* From a daemon that took over: what is open is to be sent once more. */
static const uint32_t EVERY_VCPU = UINT32_MAX;

static uint64_t bitmap_size(const struct region *region)
{
    return (region->size / region->page_size + 63) / 64 * sizeof(uint64_t);
}

/* One behind the other, in a memfd that cannot shrink, so that the daemon need not fear SIGBUS. */
static void create_bitmaps(struct memory *memory)
{
    uint64_t size = 0;
    int file = memfd_create("userfault-bitmaps", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    void *mapping;

    for (unsigned i = 0; i < memory->regions; i++) {
        memory->region[i].bitmap_offset = size;
        size += bitmap_size(&memory->region[i]);
    }
    if (file < 0 || ftruncate(file, (off_t)size) < 0 ||
        fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
        fail(EX_OSERR, "a sealed memfd of %llu bytes for userfault bitmaps: %s",
             (unsigned long long)size, strerror(errno));
    mapping = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (mapping == MAP_FAILED)
        fail(EX_OSERR, "mapping the userfault bitmaps: %s", strerror(errno));
    memset(mapping, 0xff, size);
    memory->bitmaps = mapping;
    memory->bitmap_file = file;
}

/* A request that the daemon is not there to take is open until it, or its successor, is. */
static void send_request(const struct userfault *userfault, unsigned vcpu)
{
    struct datagram request = {.vcpu = htole32(vcpu), .gpa = htole64(userfault->ask[vcpu].gpa)};

    if (send(userfault->socket, &request, sizeof(request), MSG_NOSIGNAL) < 0 && errno != EPIPE &&
        errno != ECONNRESET)
        fail(EX_IOERR, "vCPU %u cannot ask for a page: %s", vcpu, strerror(errno));
}

static void close_ask(struct ask *ask, uint32_t pages)
{
    ask->open = false;
    ask->pages = pages;
    pthread_cond_signal(&ask->answered);
}

/* An answer that nobody waits for is one to a request that was sent twice. */
static void take_answer(struct userfault *userfault, const struct datagram *answer)
{
    uint32_t vcpu = le32toh(answer->vcpu);

    pthread_mutex_lock(&userfault->lock);
    for (unsigned i = 0; vcpu == EVERY_VCPU && i < GUEST_VCPUS; i++)
        if (userfault->ask[i].open)
            send_request(userfault, i);
    if (vcpu < GUEST_VCPUS && userfault->ask[vcpu].open &&
        userfault->ask[vcpu].gpa == le64toh(answer->gpa))
        close_ask(&userfault->ask[vcpu], le32toh(answer->pages));
    pthread_mutex_unlock(&userfault->lock);
}

static void *answers_main(void *argument)
{
    struct userfault *userfault = argument;
    struct datagram answer;
    ssize_t size;

    while ((size = recv(userfault->socket, &answer, sizeof(answer), 0)) > 0) {
        if (size != sizeof(answer))
            fail(EX_PROTOCOL, "fault socket: a datagram of %zd bytes: sent by the daemon", size);
        take_answer(userfault, &answer);
    }
    return NULL; /* the daemon and all who kept its end are gone: whoever waits goes on waiting */
}

void userfault_create(struct userfault *userfault, struct memory *memory,
                      const struct options *options, int kvm)
{
    pthread_t thread;
    int pair[2], error;

    if (options->prefault && ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_PRE_FAULT_MEMORY) <= 0)
        fail(EX_UNAVAILABLE, "this KVM has no KVM_PRE_FAULT_MEMORY (Linux 6.11 and later, with "
                             "hardware page tables): leave --prefault away");
    create_bitmaps(memory);
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        fail(EX_OSERR, "a pair of sockets: %s", strerror(errno));
    userfault->socket = pair[0];
    userfault->daemons = pair[1];
    userfault->prefault = options->prefault;
    pthread_mutex_init(&userfault->lock, NULL);
    for (unsigned i = 0; i < GUEST_VCPUS; i++)
        pthread_cond_init(&userfault->ask[i].answered, NULL);
    error = pthread_create(&thread, NULL, answers_main, userfault);
    if (error)
        fail(EX_OSERR, "a thread for answers: %s", strerror(error));
}

void userfault_sent(struct userfault *userfault)
{
    close_cleanup(&userfault->daemons);
}

/* A page that cannot be mapped ahead costs a fault that KVM handles alone. */
static void prefault(const struct vcpu *vcpu, uint64_t gpa, uint32_t pages)
{
    struct userfault *userfault = &vcpu->machine->userfault;
    struct kvm_pre_fault_memory range = {.gpa = gpa, .size = (uint64_t)pages * GUEST_PAGE};

    while (range.size && ioctl(vcpu->fd, KVM_PRE_FAULT_MEMORY, &range) == 0)
        ;
    pthread_mutex_lock(&userfault->lock);
    userfault->prefaulted += pages - range.size / GUEST_PAGE;
    pthread_mutex_unlock(&userfault->lock);
}

void userfault_resolve(struct vcpu *vcpu, uint64_t gpa)
{
    struct userfault *userfault = &vcpu->machine->userfault;
    struct ask *ask = &userfault->ask[vcpu->id];
    uint32_t pages;

    pthread_mutex_lock(&userfault->lock);
    userfault->asked++;
    ask->gpa = gpa;
    ask->pages = 0;
    ask->open = !userfault->done;
    if (ask->open)
        send_request(userfault, vcpu->id);
    while (ask->open)
        pthread_cond_wait(&ask->answered, &userfault->lock);
    pages = ask->pages;
    pthread_mutex_unlock(&userfault->lock);
    if (userfault->prefault && pages)
        prefault(vcpu, gpa, pages);
}

void userfault_done(struct userfault *userfault)
{
    pthread_mutex_lock(&userfault->lock);
    userfault->done = true;
    for (unsigned i = 0; i < GUEST_VCPUS; i++)
        if (userfault->ask[i].open)
            close_ask(&userfault->ask[i], 0);
    pthread_mutex_unlock(&userfault->lock);
}

void userfault_report(struct userfault *userfault, struct json *json)
{
    pthread_mutex_lock(&userfault->lock);
    json_number(json, "vcpu_exits", userfault->asked);
    json_number(json, "prefaulted_pages", userfault->prefaulted);
    pthread_mutex_unlock(&userfault->lock);
}
