/*
 * The destination: hands its empty memory to the daemon, and runs the guest from "ready" on, while
 * pages still arrive. Nothing here may touch guest memory before "done": a touch would wait as a
 * vCPU does.
 */
#include <errno.h>
#include <poll.h>
#include <string.h>

#include "base.h"
#include "commands.h"
#include "handoff.h"
#include "json.h"
#include "report.h"
#include "sides.h"
#include "state.h"
#include "touches.h"
#include "uffd.h"
#include "verify.h"

struct destination {
    struct machine machine;
    struct commands commands;
    struct message message;
    struct arrival arrival;
    struct clocks start;
    uint64_t switched_ns; /* the last instruction at the source */
    int uffd, daemon;
    bool running, done, ended;
    int exit_code;
};

static void send_regions(struct destination *destination, const char *migration)
{
    struct machine *machine = &destination->machine;
    const struct memory *memory = &machine->memory;
    unsigned uffd = memory->files, count = uffd + 1;
    int fds[HANDOFF_FDS];
    struct json json;

    memcpy(fds, memory->file, uffd * sizeof(int));
    fds[uffd] = destination->uffd;
    json_begin(&json);
    json_number(&json, "gmemd", 1);
    json_string(&json, "receive", migration);
    handoff_regions(&json, memory, &uffd);
    if (memory->bitmaps) {
        fds[count++] = memory->bitmap_file;
        json_number(&json, "vcpus", machine->vcpus);
        json_number(&json, "faults", count);
        fds[count++] = machine->userfault.daemons;
    }
    if (!handoff_send(destination->daemon, json_end(&json), fds, count))
        fail(EX_PROTOCOL, "gmemd closed the connection");
    if (memory->bitmaps)
        userfault_sent(&machine->userfault);
}

static void report_ready(const struct destination *destination)
{
    char trap[64] = "", populate[64] = "";
    struct json event;

    json_get_string(destination->message.text, "trap", trap, sizeof(trap));
    json_get_string(destination->message.text, "populate", populate, sizeof(populate));
    json_begin(&event);
    json_string(&event, "event", "ready");
    json_string(&event, "trap", trap);
    json_string(&event, "populate", populate);
    json_string(&event, "guest", options_guest_name(destination->machine.guest));
    json_print(&event);
}

static void report_first_instruction(struct destination *destination)
{
    uint64_t at_ns = machine_started_ns(&destination->machine);
    struct json event;

    json_begin(&event);
    json_string(&event, "event", "first-instruction");
    json_number(&event, "at_ns", at_ns);
    json_number(&event, "downtime_us", (at_ns - destination->switched_ns) / 1000);
    json_print(&event);
}

static void take_ready(struct destination *destination)
{
    struct machine *machine = &destination->machine;
    CLEANUP_CLOSE int blob = message_take_fd(&destination->message, "state");
    struct state state;

    if (blob < 0)
        fail(EX_PROTOCOL, "\"ready\" came without the guest's state: sent by the daemon");
    state = state_load(blob, machine);
    machine_restore(machine, &state.workload, state.vcpu);
    for (unsigned i = 0; i < machine->vcpus; i++)
        destination->arrival.steps[i] = state.vcpu[i].steps;
    destination->switched_ns = state.stopped_ns;
    destination->start = clocks_read();
    destination->running = true;
    machine_go(machine);
    report_ready(destination);
    report_first_instruction(destination);
}

static void take_done(struct destination *destination)
{
    struct machine *machine = &destination->machine;
    double ticks_per_us = clocks_ticks_per_us(destination->start, clocks_read());
    double blocked_us = (double)touches_blocked(machine) / ticks_per_us;
    uint64_t duration_us = (now_ns() - machine_started_ns(machine)) / 1000;
    struct json event;

    if (machine->memory.bitmaps)
        userfault_done(&machine->userfault);
    machine_measure(machine, false);
    destination->arrival.ticks_per_us = ticks_per_us;
    destination->arrival.blocked_us = blocked_us;
    destination->arrival.blocked_share = blocked_us / (double)(duration_us * machine->vcpus);
    destination->done = true;
    close_cleanup(&destination->uffd);
    destination->uffd = -1;
    json_begin(&event);
    json_string(&event, "event", "done");
    json_number(&event, "since_first_instruction_us", duration_us);
    if (machine->memory.bitmaps)
        userfault_report(&machine->userfault, &event);
    json_print(&event);
}

/* The guest goes on: its pages may still come from a daemon that adopts it. */
static void lose_daemon(struct destination *destination, const char *why)
{
    if (!destination->running)
        fail(EX_PROTOCOL, "gmemd, before it was ready: %s", why);
    close_cleanup(&destination->daemon);
    destination->daemon = -1;
    if (!destination->done)
        report_message("disconnected", why);
}

static void take_word(struct destination *destination, const char *key)
{
    char why[512] = "";

    json_get_string(destination->message.text, key, why, sizeof(why));
    if (!destination->running)
        fail(EX_PROTOCOL, "gmemd: %s", why);
    report_message(key, why);
}

static void take_message(struct destination *destination)
{
    const char *wrong = handoff_receive(destination->daemon, &destination->message);
    const char *text = destination->message.text;

    if (wrong)
        lose_daemon(destination, wrong);
    else if (json_has(text, "error"))
        take_word(destination, "error");
    else if (json_has(text, "abandoned"))
        take_word(destination, "abandoned");
    else if (json_get_true(text, "ready") && !destination->running)
        take_ready(destination);
    else if (json_get_true(text, "done") && destination->running && !destination->done)
        take_done(destination);
    message_close(&destination->message);
}

static void take_note(struct destination *destination)
{
    struct note note = machine_next_note(&destination->machine);

    if (note.reason != GUEST_WRONG)
        return;
    verify_report_wrong(&destination->machine, note.vcpu);
    machine_command(&destination->machine, GUEST_STOP);
    destination->exit_code = EX_DATAERR;
}

static void take_verify(struct destination *destination, const struct command *command)
{
    if (!destination->done || destination->ended) {
        report_message("refused", destination->ended ? "verify: that was done"
                                                     : "verify: memory is not complete yet");
        return;
    }
    destination->ended = true;
    destination->exit_code = verify(&destination->machine, &destination->arrival,
                                    (char *const *)command->word + 1, command->words - 1);
}

/* False when it is time to go. */
static bool take_commands(struct destination *destination)
{
    struct command command;

    if (!commands_read(&destination->commands))
        return false;
    while ((command = commands_next(&destination->commands)).words) {
        if (strcmp(command.word[0], "quit") == 0)
            return false;
        if (strcmp(command.word[0], "verify") == 0)
            take_verify(destination, &command);
        else
            report_message("refused", "there is no such command");
    }
    return true;
}

int destination_main(const struct options *options)
{
    static struct destination memory; /* outlives the vCPUs: nothing waits for them at the end */
    struct destination *destination = &memory;

    machine_create(&destination->machine, options);
    destination->uffd = uffd_create();
    destination->daemon = handoff_connect(options->gmemd);
    send_regions(destination, options->migration);
    for (;;) {
        struct pollfd polled[] = {
            {.fd = STDIN_FILENO, .events = POLLIN},
            {.fd = destination->machine.notes[0], .events = POLLIN},
            {.fd = destination->daemon, .events = POLLIN},
        };

        if (poll(polled, 3, -1) < 0 && errno != EINTR)
            fail(EX_OSERR, "poll: %s", strerror(errno));
        if (polled[1].revents)
            take_note(destination);
        if (polled[2].revents)
            take_message(destination);
        /* Last, as they read notes of their own. */
        if (polled[0].revents && !take_commands(destination))
            break;
    }
    return destination->exit_code;
}
