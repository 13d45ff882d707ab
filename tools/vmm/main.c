/* A reference VMM: its guest checks its own memory, and comes and goes as docs/handoff.md says. */
#include "sides.h"

int main(int argc, char **argv)
{
    struct options options = options_parse(argc, argv);

    return options.destination ? destination_main(&options) : source_main(&options);
}
