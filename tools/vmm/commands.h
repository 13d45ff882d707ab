/* Commands from stdin: one a line, words apart by spaces. */
#ifndef GMEMD_VMM_COMMANDS_H
#define GMEMD_VMM_COMMANDS_H

#include "options.h"

enum { COMMAND_TEXT = 16 << 10, COMMAND_WORDS = 1 + OPTIONS_REGIONS };

struct commands {
    char text[COMMAND_TEXT];
    unsigned filled, used;
};

struct command {
    char *word[COMMAND_WORDS]; /* point into the text that was read, until the next call */
    unsigned words;            /* 0: no whole line is there yet */
};

/* Reads what there is; false at the end of stdin. */
bool commands_read(struct commands *commands);
struct command commands_next(struct commands *commands);

#endif
