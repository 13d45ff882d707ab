/*
 * The source: fills memory, runs the guest, answers gmemd-source. Once paused it keeps memory as
 * it is, for as long as some gmemd-source may still come and ask for it.
 */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

#include "base.h"
#include "commands.h"
#include "handoff.h"
#include "json.h"
#include "report.h"
#include "sides.h"
#include "state.h"
#include "verify.h"

enum phase { PHASE_FILL, PHASE_RUN, PHASE_PAUSED, PHASE_ENDED };

struct source {
    const struct options *options;
    struct machine machine;
    struct commands commands;
    struct message message;
    enum phase phase;
    unsigned filled; /* vCPUs that are done with it */
    int listener, client;
    int state; /* the blob, once paused */
    int exit_code;
};

static void report_filled(const struct machine *machine)
{
    struct json event;

    json_begin(&event);
    json_string(&event, "event", "filled");
    json_string(&event, "guest", options_guest_name(machine->guest));
    json_number(&event, "pages", machine->params.pages);
    json_number(&event, "data_pages", machine->params.data_pages);
    json_number(&event, "duration_us", (now_ns() - machine->vcpu[0].started_ns) / 1000);
    json_print(&event);
}

static void report_paused(const struct machine *machine)
{
    struct json event;
    char path[64];

    json_begin(&event);
    json_string(&event, "event", "paused");
    json_number(&event, "at_ns", machine_stopped_ns(machine));
    machine_report_steps(machine, &event);
    json_open(&event, "memory", '[');
    for (unsigned i = 0; i < machine->memory.files; i++) {
        snprintf(path, sizeof(path), "/proc/%d/fd/%d", getpid(), machine->memory.file[i]);
        json_string(&event, NULL, path);
    }
    json_close(&event, ']');
    json_print(&event);
}

static void disconnect(struct source *source)
{
    close_cleanup(&source->client);
    source->client = -1;
}

static void answer(struct source *source, struct json *json, const int *fds, unsigned count)
{
    if (!handoff_send(source->client, json_end(json), fds, count))
        disconnect(source);
}

static void answer_error(struct source *source, const char *message)
{
    struct json json;

    json_begin(&json);
    json_string(&json, "error", message);
    answer(source, &json, NULL, 0);
}

static void answer_send(struct source *source)
{
    uint64_t version = 0;
    struct json json;

    if (!json_get_number(source->message.text, "gmemd", &version) || version != 1) {
        answer_error(source, "this VMM speaks version 1 of the hand-off: sent by gmemd-source");
        return;
    }
    json_begin(&json);
    handoff_regions(&json, &source->machine.memory, NULL);
    answer(source, &json, source->machine.memory.file, source->machine.memory.files);
}

/* The guest wakes up elsewhere: from its first instruction there it times what it touches. */
static void pause_guest(struct source *source)
{
    machine_stop(&source->machine);
    machine_measure(&source->machine, true);
    source->state = state_save(&source->machine);
    source->phase = PHASE_PAUSED;
    report_paused(&source->machine);
}

static void answer_pause(struct source *source)
{
    struct json json;

    if (source->phase == PHASE_ENDED) {
        answer_error(source, "the guest has ended");
        return;
    }
    if (source->phase == PHASE_RUN)
        pause_guest(source);
    json_begin(&json);
    json_bool(&json, "paused", true);
    json_number(&json, "state", 0);
    answer(source, &json, &source->state, 1);
}

static void take_error(struct source *source)
{
    char why[256] = "";

    json_get_string(source->message.text, "error", why, sizeof(why));
    report_message("failed", why);
    if (!json_get_true(source->message.text, "resume") || source->phase != PHASE_PAUSED)
        return;
    close(source->state);
    machine_measure(&source->machine, false);
    machine_go(&source->machine);
    source->phase = PHASE_RUN;
    report("resumed");
}

static void take_message(struct source *source)
{
    const char *wrong = handoff_receive(source->client, &source->message);
    const char *text = source->message.text;

    if (wrong) {
        report_message("disconnected", wrong);
        disconnect(source);
    } else if (json_has(text, "send")) {
        answer_send(source);
    } else if (json_get_true(text, "pause")) {
        answer_pause(source);
    } else if (json_get_true(text, "done")) {
        report("done");
    } else if (json_has(text, "error")) {
        take_error(source);
    } else {
        answer_error(source, "there is no such request: sent by gmemd-source");
    }
    message_close(&source->message);
}

static void take_client(struct source *source)
{
    int client = accept4(source->listener, NULL, NULL, SOCK_CLOEXEC);
    struct json json;

    if (client < 0)
        fail(EX_OSERR, "accepting on %s: %s", source->options->listen, strerror(errno));
    if (source->client < 0) {
        source->client = client;
        return;
    }
    json_begin(&json);
    json_string(&json, "error", "another gmemd-source is connected");
    handoff_send(client, json_end(&json), NULL, 0);
    close(client);
}

static void take_note(struct source *source)
{
    struct note note = machine_next_note(&source->machine);

    if (note.reason == GUEST_WRONG) {
        verify_report_wrong(&source->machine, note.vcpu);
        machine_command(&source->machine, GUEST_STOP);
        source->exit_code = EX_DATAERR;
    }
    if (note.reason != GUEST_FILLED || ++source->filled < source->machine.vcpus)
        return;
    report_filled(&source->machine);
    source->listener = handoff_listen(source->options->listen);
    machine_go(&source->machine);
    source->phase = PHASE_RUN;
    report("running");
}

/* False when it is time to go. */
static bool take_commands(struct source *source)
{
    struct command command;

    if (!commands_read(&source->commands))
        return false;
    while ((command = commands_next(&source->commands)).words) {
        if (strcmp(command.word[0], "quit") == 0)
            return false;
        if (strcmp(command.word[0], "verify") != 0) {
            report_message("refused", "there is no such command");
        } else if (source->phase != PHASE_RUN) {
            report_message("refused", "verify: the guest does not run");
        } else {
            source->phase = PHASE_ENDED;
            source->exit_code = verify(&source->machine, NULL, command.word + 1, command.words - 1);
        }
    }
    return true;
}

int source_main(const struct options *options)
{
    static struct source memory; /* outlives the vCPUs: nothing waits for them at the end */
    struct source *source = &memory;

    source->options = options;
    source->listener = source->client = -1;
    machine_create(&source->machine, options);
    machine_reset(&source->machine, &options->workload);
    machine_go(&source->machine);
    for (;;) {
        struct pollfd polled[] = {
            {.fd = STDIN_FILENO, .events = POLLIN},
            {.fd = source->machine.notes[0], .events = POLLIN},
            {.fd = source->listener, .events = POLLIN},
            {.fd = source->client, .events = POLLIN},
        };

        if (poll(polled, 4, -1) < 0 && errno != EINTR)
            fail(EX_OSERR, "poll: %s", strerror(errno));
        if (polled[1].revents)
            take_note(source);
        if (polled[3].revents)
            take_message(source);
        if (polled[2].revents)
            take_client(source);
        /* Last, as they read notes of their own. */
        if (polled[0].revents && !take_commands(source))
            break;
    }
    unlink(options->listen);
    return source->exit_code;
}
