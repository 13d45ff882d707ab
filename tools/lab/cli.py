"""Run a command under the lab kernel, with the host's files as its root.

All is read-only but the folders named by -w; /tmp, /run and /dev/shm are fresh. The working directory,
PATH and HOME are the caller's.

Exit status: the command's own; 64 wrong use, 66 what an option names is not there, 69 there is no QEMU, no
busybox or no lab kernel, 70 the kernel stopped before the command ended or warned of something, 124 out of
time.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from tools.lab.failure import LabError, Unavailable
from tools.lab.machine import Machine, Outcome, run

CHECKOUT = Path(__file__).resolve().parents[2]
KERNELS = (CHECKOUT.parent / "shared/lab/bzImage", CHECKOUT / "build/lab/bzImage")
TIMED_OUT = 124
TAIL = 20  # lines of a console that tell why a kernel stopped


def default_kernel() -> Path:
    named = os.environ.get("GMEMD_LAB_KERNEL")
    if named:
        return Path(named)
    for path in KERNELS:
        if path.is_file():
            return path
    raise Unavailable("no lab kernel: `make lab-kernel` builds it, or GMEMD_LAB_KERNEL names one")


def environment(wanted: list[str]) -> dict[str, str]:
    """What the command gets: enough to find its programs, and what -e asked for."""
    result = {name: os.environ[name] for name in ("PATH", "HOME", "USER") if name in os.environ}
    result |= {"TERM": "dumb", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
    result["GMEMD_VMM_NICE"] = "19"  # or a demo waits 30 s for a sender to start beside the guest
    for item in wanted:
        name, given, value = item.partition("=")
        if given:
            result[name] = value
        elif name in os.environ:
            result[name] = os.environ[name]
    return result


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="run [OPTION...] -- COMMAND [ARGUMENT...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-c", dest="cpus", type=int, default=2, metavar="CPUS")
    add("-m", dest="memory", default="2G", metavar="MEMORY")
    add("-t", dest="seconds", type=float, default=600.0, metavar="SECONDS", help="for all, boot included")
    add("-w", dest="writable", type=folder, action="append", default=[], metavar="FOLDER")
    add("-e", dest="environment", action="append", default=[], metavar="NAME[=VALUE]", help="set a variable")
    add("-k", dest="kernel", type=Path, metavar="IMAGE", help="instead of the lab kernel")
    add("-M", dest="modules", type=folder, metavar="FOLDER", help="the kernel's lib/modules/RELEASE")
    add("-W", dest="warnings", action="store_true", help="a warning of the kernel is no failure")
    add("-v", dest="verbose", action="store_true", help="show the console at the end")
    add("command", nargs="+", metavar="COMMAND")
    try:
        return parser.parse_args()
    except SystemExit as error:
        raise SystemExit(os.EX_USAGE if error.code else 0) from None


def folder(text: str) -> Path:
    path = Path(text).resolve()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is not a folder")
    return path


def say(*lines: str) -> None:
    for line in lines:
        print(f"lab: {line}", file=sys.stderr)


def verdict(outcome: Outcome, args: argparse.Namespace) -> int:
    console = outcome.console.splitlines()
    complaints = [] if args.warnings else outcome.complaints()
    say(*(console if args.verbose else complaints))
    if outcome.timed_out:
        say(f"killed: not done after {args.seconds:g} s")
        return TIMED_OUT
    if outcome.status is None:
        say(*([] if complaints or args.verbose else console[-TAIL:]))
        say("the kernel stopped before the command ended")
        return os.EX_SOFTWARE
    if complaints:
        say("the kernel warned, as shown above")
        return outcome.status or os.EX_SOFTWARE
    return outcome.status


def main() -> int:
    args = arguments()
    for number in (signal.SIGINT, signal.SIGPIPE):  # die of them, as other programs do
        signal.signal(number, signal.SIG_DFL)
    try:
        outcome = run(
            Machine(
                kernel=(args.kernel or default_kernel()).resolve(),
                modules=args.modules,
                cpus=args.cpus,
                memory=args.memory,
                writable=args.writable,
                visible=[Path.cwd(), CHECKOUT],
                environment=environment(args.environment),
            ),
            args.command,
            args.seconds,
        )
    except LabError as error:
        say(str(error))
        return error.status
    return verdict(outcome, args)


if __name__ == "__main__":
    sys.exit(main())
