#include "arguments.h"

#include <errno.h>
#include <getopt.h>
#include <string.h>

#include "../vmm/base.h"

static uint64_t number(const char *name, const char *text)
{
    char *end;
    uint64_t value;

    errno = 0;
    value = strtoull(text, &end, 10);
    if (errno || end == text || *end)
        fail(EX_USAGE, "--%s %s: not a number", name, text);
    return value;
}

static enum backing backing(const char *text)
{
    if (strcmp(text, "memfd") == 0)
        return BACKING_MEMFD;
    if (strcmp(text, "tmpfs") == 0)
        return BACKING_TMPFS;
    if (strcmp(text, "hugetlb") == 0)
        return BACKING_HUGETLB;
    fail(EX_USAGE, "--backing %s: memfd, tmpfs or hugetlb", text);
}

static void take(struct arguments *a, char option, const char *name, const char *text)
{
    switch (option) {
    case 'm':
        a->machine.memory = number(name, text);
        break;
    case 'b':
        a->machine.backing = backing(text);
        break;
    case 'g':
        a->machine.gmemd = text;
        break;
    case 'i':
        a->machine.migration = text;
        break;
    case 'f':
        a->source = text;
        break;
    case 't':
        a->threads = (unsigned)number(name, text);
        break;
    case 'n':
        a->touches = number(name, text);
        break;
    case 'k':
        a->think_ns = number(name, text);
        break;
    case 'd':
        a->stride = (uint32_t)number(name, text);
        break;
    case 'S':
        a->stages = text;
        break;
    case 'v':
        a->image = text;
        break;
    case 'r':
        a->random = true;
        break;
    case 's':
        a->sleep = true;
        break;
    default:
        fail(EX_USAGE, "there is no such option");
    }
}

struct arguments arguments_parse(int argc, char **argv)
{
    static const struct option known[] = {
        {"memory", required_argument, NULL, 'm'},  {"backing", required_argument, NULL, 'b'},
        {"gmemd", required_argument, NULL, 'g'},   {"migration", required_argument, NULL, 'i'},
        {"source", required_argument, NULL, 'f'},  {"threads", required_argument, NULL, 't'},
        {"touches", required_argument, NULL, 'n'}, {"think-ns", required_argument, NULL, 'k'},
        {"stride", required_argument, NULL, 'd'},  {"stages", required_argument, NULL, 'S'},
        {"vcpu", required_argument, NULL, 'v'},    {"random", no_argument, NULL, 'r'},
        {"sleep", no_argument, NULL, 's'},         {NULL, 0, NULL, 0},
    };
    struct arguments a = {.machine = {.memory = 256u << 20, .regions = 1}, .threads = 1, .stride = 1};
    int option, index = 0;

    while ((option = getopt_long(argc, argv, "", known, &index)) != -1)
        take(&a, (char)option, known[index].name, optarg);
    if (optind < argc)
        fail(EX_USAGE, "%s: not understood", argv[optind]);
    return a;
}
