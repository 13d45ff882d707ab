#include "problem.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

int gm_blame(struct gm_problem *ret, enum gm_blame blame, int error, const char *format, ...)
{
    va_list args;
    int length;

    ret->blame = blame;
    ret->error = error;
    va_start(args, format);
    length = vsnprintf(ret->text, sizeof ret->text, format, args);
    va_end(args);
    if (error && length >= 0 && (size_t)length < sizeof ret->text)
        snprintf(ret->text + length, sizeof ret->text - (size_t)length, ": %s", strerror(error));
    return -1;
}

int gm_blame_in(struct gm_problem *ret, const struct gm_problem *why, const char *format, ...)
{
    size_t room = sizeof ret->text;
    va_list args;
    int length;

    ret->blame = why->blame;
    ret->error = why->error;
    va_start(args, format);
    length = vsnprintf(ret->text, room, format, args);
    va_end(args);
    if (length >= 0 && (size_t)length < room)
        snprintf(ret->text + length, room - (size_t)length, ": %.*s", (int)room - length, why->text);
    return -1;
}
