#include "report.h"

#include "json.h"

void report(const char *event)
{
    struct json json;

    json_begin(&json);
    json_string(&json, "event", event);
    json_print(&json);
}

void report_message(const char *event, const char *message)
{
    struct json json;

    json_begin(&json);
    json_string(&json, "event", event);
    json_string(&json, "message", message);
    json_print(&json);
}
