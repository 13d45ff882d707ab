/*
 * A reader for the few small messages of the hand-off. The text comes from another process:
 * json_is_object() walks all of it with bounded depth before anything is looked up, and the look-
 * ups then walk the same way.
 */
#include "json.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* The deepest message of the hand-off has 3 levels; unknown keys may bring some more. */
enum { DEPTH_LIMIT = 16 };

static const char *skip_value(const char *at, unsigned depth);

static const char *skip_space(const char *at)
{
    return at + strspn(at, " \t\r\n");
}

/* Each skip returns what follows, or NULL if the text is not what it should be. */
static const char *skip_string(const char *at)
{
    if (*at++ != '"')
        return NULL;
    for (; *at != '"'; at++) {
        if ((unsigned char)*at < 0x20)
            return NULL;
        if (*at != '\\')
            continue;
        at++;
        if (*at == 'u') {
            for (unsigned digit = 0; digit < 4; digit++)
                if (!isxdigit((unsigned char)*++at))
                    return NULL;
        } else if (!*at || !strchr("\"\\/bfnrt", *at)) {
            return NULL;
        }
    }
    return at + 1;
}

static const char *skip_digits(const char *at)
{
    size_t digits = strspn(at, "0123456789");

    return digits ? at + digits : NULL;
}

static const char *skip_number(const char *at)
{
    if (*at == '-')
        at++;
    at = *at == '0' ? at + 1 : skip_digits(at);
    if (at && *at == '.')
        at = skip_digits(at + 1);
    if (at && (*at == 'e' || *at == 'E')) {
        at++;
        at = skip_digits(*at == '+' || *at == '-' ? at + 1 : at);
    }
    return at;
}

static const char *skip_literal(const char *at)
{
    static const char *const literals[] = {"true", "false", "null"};

    for (unsigned i = 0; i < 3; i++)
        if (strncmp(at, literals[i], strlen(literals[i])) == 0)
            return at + strlen(literals[i]);
    return NULL;
}

static const char *skip_key(const char *at)
{
    at = skip_string(at);
    if (!at)
        return NULL;
    at = skip_space(at);
    return *at == ':' ? skip_space(at + 1) : NULL;
}

static const char *skip_members(const char *at, char end, unsigned depth)
{
    at = skip_space(at + 1);
    if (*at == end)
        return at + 1;
    for (;;) {
        if (end == '}')
            at = skip_key(at);
        if (at)
            at = skip_value(at, depth + 1);
        if (!at)
            return NULL;
        at = skip_space(at);
        if (*at == end)
            return at + 1;
        if (*at != ',')
            return NULL;
        at = skip_space(at + 1);
    }
}

static const char *skip_value(const char *at, unsigned depth)
{
    if (depth > DEPTH_LIMIT)
        return NULL;
    if (*at == '{')
        return skip_members(at, '}', depth);
    if (*at == '[')
        return skip_members(at, ']', depth);
    if (*at == '"')
        return skip_string(at);
    if (*at == '-' || isdigit((unsigned char)*at))
        return skip_number(at);
    return skip_literal(at);
}

bool json_is_object(const char *text)
{
    const char *at = skip_space(text);

    if (*at != '{')
        return false;
    at = skip_value(at, 0);
    return at && *skip_space(at) == '\0';
}

/* The value of a member of the outermost object; the text has passed json_is_object(). */
static const char *find(const char *text, const char *key)
{
    const char *at = skip_space(skip_space(text) + 1);
    size_t length = strlen(key);

    while (*at == '"') {
        bool found = strncmp(at + 1, key, length) == 0 && at[1 + length] == '"';

        at = skip_key(at);
        if (found)
            return at;
        at = skip_space(skip_value(at, 1));
        if (*at == ',')
            at = skip_space(at + 1);
    }
    return NULL;
}

bool json_has(const char *text, const char *key)
{
    return find(text, key) != NULL;
}

bool json_get_number(const char *text, const char *key, uint64_t *ret)
{
    const char *value = find(text, key);
    unsigned long long number;
    char *end;

    if (!value || !isdigit((unsigned char)*value))
        return false;
    errno = 0;
    number = strtoull(value, &end, 10);
    if (errno || *end == '.' || *end == 'e' || *end == 'E')
        return false;
    *ret = number;
    return true;
}

bool json_get_true(const char *text, const char *key)
{
    const char *value = find(text, key);

    return value && *value == 't';
}

bool json_get_string(const char *text, const char *key, char *ret, size_t size)
{
    const char *value = find(text, key);
    size_t length;

    if (!value || *value != '"')
        return false;
    length = (size_t)(skip_string(value) - value) - 2;
    if (length > size - 1)
        length = size - 1;
    memcpy(ret, value + 1, length);
    ret[length] = '\0';
    return true;
}
