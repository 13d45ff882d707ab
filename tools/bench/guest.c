/*
 * A guest of gmemd that does nothing but touch: hands its empty memory over, waits for "ready", touches as the floor
 * does, and tells how long it waited.
 */
#include <string.h>

#include "../vmm/base.h"
#include "../vmm/handoff.h"
#include "../vmm/uffd.h"
#include "touch.h"

static struct message message;

static void send_regions(int daemon, const struct memory *memory, const char *migration)
{
    unsigned count = memory->files;
    int fds[HANDOFF_FDS];
    struct json json;

    memcpy(fds, memory->file, count * sizeof(int));
    fds[count] = uffd_create();
    json_begin(&json);
    json_number(&json, "gmemd", 1);
    json_string(&json, "receive", migration);
    handoff_regions(&json, memory, &count);
    if (!handoff_send(daemon, json_end(&json), fds, count + 1))
        fail(EX_PROTOCOL, "gmemd closed the connection");
}

/* Waits for the message that has this member; anything else is the end. */
static void expect(int daemon, const char *member)
{
    const char *wrong = handoff_receive(daemon, &message);

    if (wrong)
        fail(EX_PROTOCOL, "gmemd, instead of \"%s\": %s", member, wrong);
    if (!json_get_true(message.text, member))
        fail(EX_PROTOCOL, "gmemd, instead of \"%s\": %s", member, message.text);
    message_close(&message);
}

static void report_event(const char *name)
{
    struct json json;

    json_begin(&json);
    json_string(&json, "event", name);
    json_number(&json, "at_ns", now_ns());
    json_print(&json);
}

int main(int argc, char **argv)
{
    struct arguments a = arguments_parse(argc, argv);
    struct memory memory = memory_create(&a.machine, -1);
    CLEANUP_CLOSE int daemon = -1;
    static struct touch touch;
    struct json json;

    if (!a.machine.gmemd || !a.machine.migration)
        fail(EX_USAGE, "--gmemd SOCKET and --migration ID are needed");
    touch_create(&touch, &a, &memory);
    daemon = handoff_connect(a.machine.gmemd);
    send_regions(daemon, &memory, a.machine.migration);
    report_event("sent");
    expect(daemon, "ready");
    report_event("ready");
    touch_begin(&touch);
    if (!a.touches) {
        expect(daemon, "done");
        report_event("done");
    }
    touch_join(&touch, !a.touches);
    touch_write_stages(&touch);
    json_begin(&json);
    json_string(&json, "event", "guest");
    touch_report(&touch, &json);
    json_print(&json);
    while (getchar() != EOF) /* the memory has to stay until whoever started us has looked */
        ;
    return 0;
}
