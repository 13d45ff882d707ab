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
