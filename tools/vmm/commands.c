#include "commands.h"

#include <string.h>

#include "base.h"

bool commands_read(struct commands *commands)
{
    ssize_t size;

    memmove(commands->text, commands->text + commands->used, commands->filled - commands->used);
    commands->filled -= commands->used;
    commands->used = 0;
    if (commands->filled == COMMAND_TEXT)
        fail(EX_USAGE, "a command is longer than %d bytes", COMMAND_TEXT);
    size = read(STDIN_FILENO, commands->text + commands->filled, COMMAND_TEXT - commands->filled);
    if (size > 0)
        commands->filled += (unsigned)size;
    return size > 0;
}

static struct command split(char *line)
{
    struct command command = {0};
    char *rest;

    for (char *word = strtok_r(line, " \t\r", &rest); word; word = strtok_r(NULL, " \t\r", &rest)) {
        if (command.words == COMMAND_WORDS)
            fail(EX_USAGE, "a command has more than %d words", COMMAND_WORDS);
        command.word[command.words++] = word;
    }
    return command;
}

struct command commands_next(struct commands *commands)
{
    struct command command = {0};

    while (!command.words) {
        char *line = commands->text + commands->used;
        char *end = memchr(line, '\n', commands->filled - commands->used);

        if (!end)
            break;
        *end = '\0';
        commands->used += (unsigned)(end + 1 - line);
        command = split(line);
    }
    return command;
}
