#include "options.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <string.h>

#include "base.h"
#include "layout.h"

static const char HELP[] =
    "gmemd-vmm source      --listen PATH [options]      runs a guest and gives it away\n"
    "gmemd-vmm destination --gmemd PATH --migration ID [options]    receives a guest and runs it\n"
    "\n"
    "Both must be told the same about the machine:\n"
    "  --memory SIZE       guest memory, as 512M or 1G (256M)\n"
    "  --vcpus N           1 to 8 (1)\n"
    "  --regions N         pieces that guest memory consists of, 1 to 64 (1)\n"
    "  --backing KIND      memfd, tmpfs (with large folios), hugetlb, guest_memfd, or mixed: half of it\n"
    "                      hugetlb (memfd)\n"
    "  --guest KIND        kvm, threads, or auto: kvm where /dev/kvm opens (auto)\n"
    "  --slot KIND         plain: KVM goes through the mapping; guest_memfd: it takes pages from\n"
    "                      the file, and a destination's vCPUs ask by KVM userfault (plain)\n"
    "  --no-direct-map     pages leave the kernel's direct map; with --slot guest_memfd\n"
    "\n"
    "The destination, with --slot guest_memfd:\n"
    "  --prefault          map all pages that the daemon says are there, before a vCPU goes on\n"
    "\n"
    "The source says what the guest does:\n"
    "  --pattern NAME      sequential, random, strided, hotset: which page a step writes (random)\n"
    "  --stride PAGES      of strided (7)\n"
    "  --hot-share N       per cent of the pages that hotset prefers (10)\n"
    "  --zero-share N      per cent of the data pages that are holes at first (12)\n"
    "  --seed N            of contents, choices and holes (1)\n"
    "  --rate N            steps a second and vCPU at most (no limit)\n"
    "\n"
    "Events go to stdout, a JSON object a line. Commands come from stdin, one a line:\n"
    "  verify [PATH...]    end the work; the guest checks all its memory, then the host does,\n"
    "                      with the source's at hand: PATHs as its event \"paused\" names them\n"
    "  quit                (or the end of stdin)\n"
    "\n"
    "GMEMD_VMM_NICE=N in the environment is the niceness of vCPUs.\n";

static const char *const GUEST_NAMES[] = {"kvm", "threads"};
static const char *const BACKING_NAMES[] = {"memfd", "tmpfs", "hugetlb", "guest_memfd", "mixed"};
static const char *const SLOT_NAMES[] = {"plain", "guest_memfd"};
static const char *const PATTERN_NAMES[] = {"sequential", "random", "strided", "hotset"};

/* How often a limited rate is enforced: often beside a migration, seldom beside a step. */
enum { PACES_A_SECOND = 200 };

static uint64_t parse_number(const char *name, const char *text, uint64_t least, uint64_t most)
{
    unsigned long long number;
    char *end;

    errno = 0;
    number = strtoull(text, &end, 0);
    if (errno || end == text || *end || *text == '-' || number < least || number > most)
        fail(EX_USAGE, "--%s: \"%s\" is not a number from %llu to %llu", name, text,
             (unsigned long long)least, (unsigned long long)most);
    return number;
}

static uint64_t parse_size(const char *name, const char *text)
{
    static const char units[] = "KMGT";
    unsigned long long number;
    const char *unit;
    unsigned shift = 0;
    char *end;

    errno = 0;
    number = strtoull(text, &end, 10);
    unit = *end ? strchr(units, *end) : NULL;
    if (unit)
        shift = 10 * (unsigned)(unit - units + 1);
    if (errno || end == text || *text == '-' || end[unit ? 1 : 0] || number > UINT64_MAX >> shift)
        fail(EX_USAGE, "--%s: \"%s\" is not a size such as 512M or 1G", name, text);
    return (uint64_t)number << shift;
}

static unsigned parse_name(const char *name, const char *text, const char *const *names,
                           unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        if (strcmp(text, names[i]) == 0)
            return i;
    fail(EX_USAGE, "--%s: there is no \"%s\" (see --help)", name, text);
}

static enum guest_kind parse_guest(const char *text)
{
    if (strcmp(text, "auto") == 0)
        return access("/dev/kvm", R_OK | W_OK) == 0 ? GUEST_KVM : GUEST_THREADS;
    return parse_name("guest", text, GUEST_NAMES, 2);
}

static void parse_machine(struct options *options, const char *name, const char *value)
{
    if (strcmp(name, "memory") == 0)
        options->memory = parse_size(name, value);
    else if (strcmp(name, "vcpus") == 0)
        options->vcpus = (unsigned)parse_number(name, value, 1, GUEST_VCPUS);
    else if (strcmp(name, "regions") == 0)
        options->regions = (unsigned)parse_number(name, value, 1, OPTIONS_REGIONS);
    else if (strcmp(name, "backing") == 0)
        options->backing = parse_name(name, value, BACKING_NAMES, 5);
    else if (strcmp(name, "guest") == 0)
        options->guest = parse_guest(value);
    else if (strcmp(name, "slot") == 0)
        options->slot = parse_name(name, value, SLOT_NAMES, 2);
    else if (strcmp(name, "no-direct-map") == 0)
        options->no_direct_map = true;
    else if (strcmp(name, "prefault") == 0)
        options->prefault = true;
    else if (strcmp(name, "listen") == 0)
        options->listen = value;
    else if (strcmp(name, "gmemd") == 0)
        options->gmemd = value;
    else if (strcmp(name, "migration") == 0)
        options->migration = value;
}

static void parse_workload(struct options *options, const char *name, const char *value)
{
    struct guest_workload *workload = &options->workload;

    if (strcmp(name, "pattern") == 0)
        workload->pattern = parse_name(name, value, PATTERN_NAMES, 4);
    else if (strcmp(name, "stride") == 0)
        workload->stride = parse_number(name, value, 1, 1u << 20);
    else if (strcmp(name, "hot-share") == 0)
        workload->hot_share = parse_number(name, value, 1, 100);
    else if (strcmp(name, "zero-share") == 0)
        workload->zero_share = parse_number(name, value, 0, 100);
    else if (strcmp(name, "seed") == 0)
        workload->seed = parse_number(name, value, 0, UINT64_MAX);
    else if (strcmp(name, "rate") == 0)
        workload->rate = parse_number(name, value, 1, 1u << 30);
}

static void check_slot(const struct options *options)
{
    if (options->slot == SLOT_GUEST_MEMFD && options->backing != BACKING_GUEST_MEMFD)
        fail(EX_USAGE, "--slot guest_memfd needs --backing guest_memfd");
    if (options->slot == SLOT_GUEST_MEMFD && options->guest != GUEST_KVM)
        fail(EX_UNAVAILABLE, "--slot guest_memfd is for KVM: use it where /dev/kvm opens");
    /* For a plain slot KVM pins the pages of the mapping, and these cannot be pinned. */
    if (options->no_direct_map && options->slot != SLOT_GUEST_MEMFD)
        fail(EX_USAGE, "--no-direct-map needs --slot guest_memfd");
    if (options->prefault && (!options->destination || options->slot != SLOT_GUEST_MEMFD))
        fail(EX_USAGE, "--prefault is for a destination with --slot guest_memfd");
}

static void check(struct options *options)
{
    bool huge = options->backing == BACKING_HUGETLB || options->backing == BACKING_MIXED;
    uint64_t unit = huge ? 2u << 20 : GUEST_PAGE;

    /* The page tables are made for as much as one entry of the top page reaches. */
    if (options->memory < LAYOUT_LEAST_MEMORY || options->memory > 512ull << 30 ||
        options->memory % unit != 0)
        fail(EX_USAGE, "--memory: from 1M to 512G, a multiple of %llu", (unsigned long long)unit);
    if (options->backing == BACKING_MIXED && options->regions < 2)
        fail(EX_USAGE, "--backing mixed needs --regions 2 or more");
    if (options->destination && (!options->gmemd || !options->migration))
        fail(EX_USAGE, "a destination needs --gmemd PATH and --migration ID");
    if (!options->destination && !options->listen)
        fail(EX_USAGE, "a source needs --listen PATH");
    check_slot(options);
    options->workload.pace = (options->workload.rate + PACES_A_SECOND - 1) / PACES_A_SECOND;
}

static const struct option LONG_OPTIONS[] = {
    {"memory", required_argument, NULL, 'm'},     {"vcpus", required_argument, NULL, 'm'},
    {"regions", required_argument, NULL, 'm'},    {"backing", required_argument, NULL, 'm'},
    {"guest", required_argument, NULL, 'm'},      {"listen", required_argument, NULL, 'm'},
    {"gmemd", required_argument, NULL, 'm'},      {"migration", required_argument, NULL, 'm'},
    {"slot", required_argument, NULL, 'm'},       {"no-direct-map", no_argument, NULL, 'm'},
    {"prefault", no_argument, NULL, 'm'},
    {"pattern", required_argument, NULL, 'w'},    {"stride", required_argument, NULL, 'w'},
    {"hot-share", required_argument, NULL, 'w'},  {"zero-share", required_argument, NULL, 'w'},
    {"seed", required_argument, NULL, 'w'},       {"rate", required_argument, NULL, 'w'},
    {"help", no_argument, NULL, 'h'},             {NULL, 0, NULL, 0},
};

static void help(void)
{
    fputs(HELP, stdout);
    exit(EX_OK);
}

struct options options_parse(int argc, char **argv)
{
    struct options options = {
        .memory = 256u << 20,
        .vcpus = 1,
        .regions = 1,
        .guest = parse_guest("auto"),
        .workload = {
            .seed = 1, .pattern = GUEST_RANDOM, .stride = 7, .hot_share = 10, .zero_share = 12},
    };
    int kind, index;

    if (argc > 1 && strcmp(argv[1], "--help") == 0)
        help();
    if (argc < 2 || (strcmp(argv[1], "source") != 0 && strcmp(argv[1], "destination") != 0))
        fail(EX_USAGE, "say \"source\" or \"destination\" first (see --help)");
    options.destination = strcmp(argv[1], "destination") == 0;

    opterr = 0;
    while ((kind = getopt_long(argc - 1, argv + 1, "", LONG_OPTIONS, &index)) != -1) {
        if (kind == 'h')
            help();
        if (kind == '?')
            fail(EX_USAGE, "\"%s\" is no option, or lacks its value (see --help)", argv[optind]);
        if (kind == 'm')
            parse_machine(&options, LONG_OPTIONS[index].name, optarg);
        else if (options.destination)
            fail(EX_USAGE, "--%s is for the source: it arrives with the guest",
                 LONG_OPTIONS[index].name);
        else
            parse_workload(&options, LONG_OPTIONS[index].name, optarg);
    }
    if (optind + 1 < argc)
        fail(EX_USAGE, "\"%s\" is one word too many (see --help)", argv[optind + 1]);
    check(&options);
    return options;
}

const char *options_guest_name(enum guest_kind guest)
{
    return GUEST_NAMES[guest];
}

const char *options_backing_name(enum backing backing)
{
    return BACKING_NAMES[backing];
}
