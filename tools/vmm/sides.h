/* The two subcommands. Each returns the exit code. */
#ifndef GMEMD_VMM_SIDES_H
#define GMEMD_VMM_SIDES_H

#include "options.h"

int source_main(const struct options *options);
int destination_main(const struct options *options);

#endif
