#include "json.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

static void write_string(FILE *out, const char *value)
{
    putc('"', out);
    for (; *value; value++) {
        unsigned char byte = (unsigned char)*value;

        if (byte < 0x20)
            fprintf(out, "\\u%04x", byte);
        else
            fprintf(out, byte == '"' || byte == '\\' ? "\\%c" : "%c", byte);
    }
    putc('"', out);
}

/* Members of an array have no key. */
static void write_key(struct json *json, const char *key)
{
    if (json->separate)
        putc(',', json->out);
    json->separate = true;
    if (key) {
        write_string(json->out, key);
        putc(':', json->out);
    }
}

void json_begin(struct json *json)
{
    *json = (struct json){0};
    json->out = open_memstream(&json->text, &json->size);
    if (!json->out)
        abort();
    putc('{', json->out);
}

void json_string(struct json *json, const char *key, const char *value)
{
    write_key(json, key);
    write_string(json->out, value);
}

void json_number(struct json *json, const char *key, uint64_t value)
{
    write_key(json, key);
    fprintf(json->out, "%" PRIu64, value);
}

void json_fraction(struct json *json, const char *key, double value)
{
    write_key(json, key);
    fprintf(json->out, "%.4f", value);
}

void json_bool(struct json *json, const char *key, bool value)
{
    write_key(json, key);
    fputs(value ? "true" : "false", json->out);
}

/* Words of guest memory: beyond what a double holds, so as strings. */
void json_hex(struct json *json, const char *key, uint64_t value)
{
    write_key(json, key);
    fprintf(json->out, "\"0x%016" PRIx64 "\"", value);
}

void json_open(struct json *json, const char *key, char bracket)
{
    write_key(json, key);
    putc(bracket, json->out);
    json->separate = false;
}

void json_close(struct json *json, char bracket)
{
    putc(bracket, json->out);
    json->separate = true;
}

char *json_end(struct json *json)
{
    putc('}', json->out);
    if (fclose(json->out) != 0)
        abort();
    return json->text;
}

void json_print(struct json *json)
{
    char *text = json_end(json);

    flockfile(stdout);
    fputs(text, stdout);
    putc('\n', stdout);
    fflush(stdout);
    funlockfile(stdout);
    free(text);
}
