#include "base.h"

#include <stdarg.h>
#include <stdio.h>

#include "report.h"

void fail(int exit_code, const char *format, ...)
{
    char message[1024];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(message, sizeof(message), format, arguments);
    va_end(arguments);

    report_message("error", message);
    _exit(exit_code); /* vCPU threads may still run: no handlers of theirs must go */
}

void *allocate(size_t count, size_t size)
{
    void *memory = calloc(count, size);

    if (!memory)
        fail(EX_OSERR, "out of memory: %zu bytes asked for", count * size);
    return memory;
}
