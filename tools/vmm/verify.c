#include "verify.h"

#include "base.h"
#include "check.h"
#include "json.h"
#include "touches.h"

void verify_report_wrong(const struct machine *machine, unsigned vcpu)
{
    const struct guest_cpu *cpu = machine_cpu(machine, vcpu);
    struct json event;

    json_begin(&event);
    json_string(&event, "event", "mismatch");
    json_number(&event, "vcpu", vcpu);
    json_number(&event, "step", cpu->steps);
    json_number(&event, "page", cpu->wrong.page);
    json_number(&event, "version", cpu->wrong.version);
    json_number(&event, "address", cpu->wrong.address);
    json_hex(&event, "expected", cpu->wrong.expected);
    json_hex(&event, "found", cpu->wrong.found);
    json_print(&event);
}

/* Has every vCPU check the pages that it owns. Those that found a wrong byte before do no more. */
static void verify_by_guest(struct machine *machine)
{
    machine_command(machine, GUEST_VERIFY);
    machine_go(machine);
    while (machine->ended < machine->vcpus) {
        struct note note = machine_next_note(machine);

        if (note.reason == GUEST_WRONG)
            verify_report_wrong(machine, note.vcpu);
        if (note.reason == GUEST_STOPPED) /* it had still read the command before */
            machine_go(machine);
    }
}

static void report(const struct machine *machine, const struct check *check,
                   const struct arrival *arrival, bool right, uint64_t guest_verified)
{
    struct json event;

    json_begin(&event);
    json_string(&event, "event", "verified");
    json_bool(&event, "ok", right);
    json_string(&event, "guest", options_guest_name(machine->guest));
    json_number(&event, "pages", machine->params.pages);
    json_number(&event, "pages_verified", guest_verified + check->host_verified);
    json_number(&event, "guest_verified", guest_verified);
    json_number(&event, "host_verified", check->host_verified);
    json_number(&event, "mismatches", check->mismatches);
    json_number(&event, "against_source", check->against_source);
    if (check->mismatches) {
        json_open(&event, "first_wrong", '{');
        json_number(&event, "address", check->first_wrong.address);
        json_hex(&event, "expected", check->first_wrong.expected);
        json_hex(&event, "found", check->first_wrong.found);
        json_close(&event, '}');
    }
    machine_report_steps(machine, &event);
    if (arrival) {
        touches_report(machine, &event, arrival->ticks_per_us);
        json_fraction(&event, "blocked_us", arrival->blocked_us);
        json_fraction(&event, "blocked_share", arrival->blocked_share);
    }
    json_print(&event);
}

int verify(struct machine *machine, const struct arrival *arrival, char *const *paths,
           unsigned path_count)
{
    uint64_t guest_verified = 0;
    struct check check;
    bool right;

    verify_by_guest(machine);
    check = check_memory(machine, arrival ? arrival->steps : NULL, paths, path_count);
    for (unsigned i = 0; i < machine->vcpus; i++)
        guest_verified += machine_cpu(machine, i)->verified;
    right = !check.mismatches && guest_verified + check.host_verified == machine->params.pages;
    report(machine, &check, arrival, right, guest_verified);
    return right ? EX_OK : EX_DATAERR;
}
