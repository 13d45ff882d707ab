#ifndef GMEMD_VMM_JSON_H
#define GMEMD_VMM_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

/* Writing: one object, built up in memory. */
struct json {
    FILE *out;
    char *text;
    size_t size;
    bool separate; /* the next member needs a comma before it */
};

void json_begin(struct json *json);
void json_string(struct json *json, const char *key, const char *value);
void json_number(struct json *json, const char *key, uint64_t value);
void json_fraction(struct json *json, const char *key, double value);
void json_bool(struct json *json, const char *key, bool value);
void json_hex(struct json *json, const char *key, uint64_t value);
void json_open(struct json *json, const char *key, char bracket);
void json_close(struct json *json, char bracket);
/* Ends the object; the text is the caller's to free. */
char *json_end(struct json *json);
/* Ends the object and writes it to stdout, as one line at once. */
void json_print(struct json *json);

/* Reading: a whole text is checked first, then members of its outermost object are asked for. */
bool json_is_object(const char *text);
bool json_has(const char *text, const char *key);
bool json_get_number(const char *text, const char *key, uint64_t *ret);
bool json_get_true(const char *text, const char *key);
/* Copies a string, escapes left as they are, cut to what `ret` can hold. */
bool json_get_string(const char *text, const char *key, char *ret, size_t size);

#endif
