"""`make bench`: gmemd beside the floor of this machine and beside QEMU, as a table and as bench.json."""

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import median

from gmemd.stages import picture
from gmemd_tools.bench import qemu
from gmemd_tools.bench.limits import LIMITS, TOLERANCE
from gmemd_tools.bench.measures import MEASURES, SLOW, Figures, bench
from gmemd_tools.bench.programs import kvm_missing

REPETITIONS, QUICK_REPETITIONS = 5, 2
MEMORY = 512 << 20
NAMES = 68  # the longest title and a space
NUMBERS = ">12"


def main() -> int:
    options = _options()
    runs: list[Figures] = []
    wanted = options.only or [name for name in MEASURES if not (options.quick and name in SLOW)]
    chosen = [name for name in MEASURES if name in wanted]
    if (why := qemu.missing()) and "qemu" in chosen:
        print(f"bench: without QEMU: {why}", file=sys.stderr)
        chosen.remove("qemu")
    if why := kvm_missing():
        print(f"bench: without vCPUs, threads stand in for them: {why}", file=sys.stderr)
    with bench(options.memory << 20) as b:
        for _ in range(options.repetitions or (QUICK_REPETITIONS if options.quick else REPETITIONS)):
            runs.append({})
            for name in chosen:
                runs[-1] |= MEASURES[name](b)
    _write(options.output, runs)
    _print_figures(runs)
    _print_stages(runs)
    kept = _print_limits(runs)
    return 0 if kept or not options.check else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    quick = f"{QUICK_REPETITIONS} repetitions, not {REPETITIONS}, of what there are limits for"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--repetitions", type=int, metavar="N")
    parser.add_argument("--memory", type=int, default=MEMORY >> 20, metavar="MIB", help="of the guests that move (512)")
    parser.add_argument("--only", action="append", choices=list(MEASURES), help="measure this; repeatable")
    parser.add_argument("--check", action="store_true", help=f"fail if a limit is missed by more than {TOLERANCE:.0%}")
    parser.add_argument("--output", type=Path, default=Path("bench.json"), metavar="FILE")
    return parser.parse_args()


def _write(path: Path, runs: list[Figures]) -> None:
    machine = {"cpus": os.cpu_count(), "kernel": os.uname().release}
    path.write_text(json.dumps({"machine": machine, "runs": runs}, indent=1) + "\n")


def _print_figures(runs: list[Figures]) -> None:
    print(f"{'figure':{NAMES}}{'median':{NUMBERS}}{'least':{NUMBERS}}{'most':{NUMBERS}}")
    for name in runs[0]:
        values = [run[name] for run in runs]
        print(f"{name:{NAMES}}" + "".join(f"{f(values):{NUMBERS},.6g}" for f in (median, min, max)))


def _print_stages(runs: list[Figures]) -> None:
    """Where the time of a fault goes."""
    steps: dict[str, dict[str, float]] = {}
    for name in runs[0]:
        stage, _, kind = name.removeprefix("stages: ").partition(", ")
        if name.startswith("stages: ") and kind:
            steps.setdefault(stage, {})[kind] = median(run[name] for run in runs)
    if steps:
        print("\n" + picture({"faults": sum(int(run["stages: faults"]) for run in runs), "steps": steps}))


def _print_limits(runs: list[Figures]) -> bool:
    """Every ratio beside its limit; whether every limit is kept within the tolerance."""
    print(f"\n{'ratio':{NAMES}}{'median':{NUMBERS}}{'least':{NUMBERS}}{'most':{NUMBERS}}{'limit':{NUMBERS}}")
    kept = True
    for limit in LIMITS:
        ratios = limit.ratios(runs)
        if not ratios:
            continue
        kept &= limit.holds(ratios, TOLERANCE)
        sign = "≥" if limit.at_least else "≤"
        verdict = "" if limit.holds(ratios) else "  missed"
        print(
            f"{limit.title:{NAMES}}{median(ratios):{NUMBERS}.3f}{min(ratios):{NUMBERS}.3f}{max(ratios):{NUMBERS}.3f}"
            f"{f'{sign} {limit.limit}':{NUMBERS}}{verdict}"
        )
    return kept


if __name__ == "__main__":
    sys.exit(main())
