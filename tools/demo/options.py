"""The options of `gmemd demo`."""

import argparse
from pathlib import Path

from gmemd import config
from gmemd.errors import DataError, UsageError, reason
from gmemd.migrate.wire import MAX_LANES
from gmemd.source_cli import USUAL_LANES, usual_lanes
from gmemd_tools import room
from gmemd_tools.demo.inject import KINDS

BASE_PAGE = 4096
LEAST_MEMORY, MOST_MEMORY = 1 << 20, 512 << 30  # what the reference VMM takes, as are these
RANGES = {"vcpus": (1, 8), "regions": (1, 64), "seed": (0, (1 << 64) - 1), "lanes": (1, MAX_LANES)}
PATTERNS = ("sequential", "random", "strided", "hotset")


def add(command: argparse.ArgumentParser) -> None:
    """Adds them to a command."""
    command.add_argument("--memory", metavar="SIZE", help="guest memory (1G, or an eighth of what is free)")
    command.add_argument("--vcpus", type=int, default=2, metavar="N", help="1 to 8 (2)")
    command.add_argument("--regions", type=int, default=1, metavar="N", help="pieces that guest memory is cut into (1)")
    command.add_argument("--backing", choices=("memfd", "tmpfs", "hugetlb", "guest_memfd", "mixed"), default="memfd")
    command.add_argument(
        "--slot",
        choices=("plain", "guest_memfd"),
        default="plain",
        help="what KVM takes guest_memfd from: its mapping, or the file itself, with KVM userfault (plain)",
    )
    command.add_argument("--no-direct-map", action="store_true", help="keep guest_memfd out of the kernel's direct map")
    command.add_argument(
        "--prefault", action="store_true", help="have vCPUs that asked for a page map what is there behind it"
    )
    command.add_argument("--pattern", choices=PATTERNS, default="random", help="how the guest picks pages (random)")
    command.add_argument(
        "--lanes", type=int, default=usual_lanes(), metavar="N", help=f"background connections ({USUAL_LANES})"
    )
    command.add_argument("--populate", choices=("auto", "write", "recv", "copy"), default="auto")
    command.add_argument("--verify", action="store_true", help="both ends compare what every page had when it came")
    command.add_argument("--tls", action="store_true", help="with TLS, between throw-away certificates")
    command.add_argument("--guest", choices=("auto", "kvm", "threads"), default="auto")
    command.add_argument("--trace", type=Path, metavar="DIR", help="record the guest's faults there")
    command.add_argument("--seed", type=int, default=1, metavar="N")
    command.add_argument("--json", action="store_true", help="one JSON object, and nothing else")
    command.add_argument(
        "--network",
        metavar="CONDITIONS",
        help="a bad network between the two, as latency=5ms,jitter=1ms,rate=100M,cut@~2s (docs/network.md)",
    )
    command.add_argument(
        "--inject",
        action="append",
        default=[],
        metavar="FAULT[@PERCENT]",
        help=f"break something when so much of the memory has arrived (50): {', '.join(KINDS)}; may be repeated",
    )


def check(options: argparse.Namespace) -> None:
    """Refuses what cannot be, and what does not go together. Adds `memory_bytes`."""
    try:
        options.memory_bytes = config.parse_size(options.memory)
    except ValueError as error:
        raise UsageError(f"--memory {options.memory}: {error}") from None
    if not LEAST_MEMORY <= options.memory_bytes <= MOST_MEMORY or options.memory_bytes % BASE_PAGE:
        raise UsageError(f"--memory {options.memory}: from 1M to 512G, a multiple of 4K")
    for name, (least, most) in RANGES.items():
        if not least <= getattr(options, name) <= most:
            raise UsageError(f"--{name} {getattr(options, name)}: {least} to {most}")
    userfault = options.slot == "guest_memfd"
    if userfault and options.backing != "guest_memfd":
        raise UsageError("--slot guest_memfd needs --backing guest_memfd")
    for name in ("no-direct-map", "prefault"):
        if getattr(options, name.replace("-", "_")) and not userfault:
            raise UsageError(f"--{name} needs --slot guest_memfd")
    if options.backing != "hugetlb":  # whose pages are set aside already
        room.check(options.memory_bytes, f"--memory {options.memory}")
    if options.trace:
        output_directory(options.trace)


def output_directory(path: Path) -> Path:
    """Makes it. A daemon that cannot write there goes on without: its guests are worth more."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path}: {reason(error)}: not a directory to record in") from None
    return path


def usual(**wanted: object) -> argparse.Namespace:
    """The options as they are unless said otherwise, for those who play a demo's cast without its command line."""
    command = argparse.ArgumentParser()
    add(command)
    return argparse.Namespace(**(vars(command.parse_args([])) | wanted))
