"""Where the time of a fault goes: files of stamps that guest, destination and source made, and the faults in them.

`python -m gmemd.stages FILE…` tells it from the files of one migration on one host (their clock is one).
"""

import argparse
import json
import struct
import sys
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from gmemd.errors import DataError
from gmemd.native.memory import Memory

MAGIC = b"GMSTAGE\x1a"
VERSION = 1
HEADER = struct.Struct("<8sII")  # magic, version, stamps
STAMP = struct.Struct("<QQ")  # time in ns, and stage, region and page
SUFFIX = ".gmstages"
BAR = 48  # characters for a whole fault


class Stage(IntEnum):
    """As `enum gm_stage` has them (gmemd/native/stages.h)."""

    TOUCHED = 1
    READ = 2
    ASKED = 3
    TAKEN = 4
    ANSWERED = 5
    ARRIVED = 6
    POPULATED = 7
    CONTINUED = 8
    RUNNING = 9


# What a stage ends.
STEPS = {
    Stage.READ: "touched → fault read",
    Stage.ASKED: "→ request made",
    Stage.TAKEN: "→ sent, read at source",
    Stage.ANSWERED: "→ answer made",
    Stage.ARRIVED: "→ sent, here",
    Stage.POPULATED: "→ in the memory file",
    Stage.CONTINUED: "→ continued",
    Stage.RUNNING: "→ running again",
}
KNOWN = {stage.value for stage in Stage}
SHARED = (Stage.ASKED, Stage.ANSWERED)  # one stamp for all that came before it


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: when it came to each stage, in ns of CLOCK_MONOTONIC."""

    region: int
    page: int
    at: dict[Stage, int]

    def steps_us(self) -> dict[Stage, float]:
        """How long each stage took since the one before."""
        times = list(self.at.items())
        return {stage: (time - before) / 1e3 for (_, before), (stage, time) in pairwise(times)}


def write(path: Path, memory: Memory) -> None:
    """Puts what was stamped on one side of a migration into a file."""
    stamps = memory.stages()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(HEADER.pack(MAGIC, VERSION, len(stamps) // STAMP.size) + stamps)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def read(paths: Iterable[Path]) -> list[tuple[int, Stage, int, int]]:
    """All stamps of some files, by time: time, stage, region, page."""
    stamps = []
    for path in paths:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        if len(data) < HEADER.size or HEADER.unpack_from(data) != (MAGIC, VERSION, len(data) // STAMP.size - 1):
            raise DataError(f"{path}: not a whole file of stamps, or of another version")
        for time, what in STAMP.iter_unpack(data[HEADER.size :]):
            if what & 0xFF not in KNOWN:
                raise DataError(f"{path}: a stamp of stage {what & 0xFF}")
            stamps.append((time, Stage(what & 0xFF), what >> 8 & 0xFFFF, what >> 24))
    return sorted(stamps)


def faults(stamps: Sequence[tuple[int, Stage, int, int]]) -> list[Fault]:
    """Every fault that came to all stages that anybody stamped. One whose page came with the background has not."""
    shared = {stage: [time for time, which, *_ in stamps if which is stage] for stage in SHARED}
    of_page: dict[tuple[int, int], list[tuple[int, Stage]]] = defaultdict(list)
    for time, stage, region, page in stamps:
        if stage not in SHARED:
            of_page[region, page].append((time, stage))
    wanted = [stage for stage in Stage if any(which is stage for _, which, *_ in stamps)]
    found = (_follow(own, wanted, shared) for own in of_page.values())
    return [Fault(*page, at) for page, at in zip(of_page, found, strict=True) if at]


def _follow(
    own: list[tuple[int, Stage]], wanted: Sequence[Stage], shared: dict[Stage, list[int]]
) -> dict[Stage, int] | None:
    """One page's way through the stages, each the first after the one before."""
    at: dict[Stage, int] = {}
    now = 0
    for stage in wanted:
        times = shared[stage] if stage in shared else [time for time, which in own if which is stage]
        if stage is Stage.RUNNING:  # it may run before the call that woke it returns
            now = at.get(Stage.POPULATED, now)
        place = bisect_left(times, now)
        if place == len(times):
            return None
        now = at[stage] = times[place]
    if Stage.RUNNING in at and Stage.CONTINUED in at:
        at[Stage.CONTINUED] = min(at[Stage.CONTINUED], at[Stage.RUNNING])
    return at


def summary(all_faults: Sequence[Fault]) -> dict[str, Any]:
    """Each step's mean and median in µs, by the name of the stage that ends it."""
    steps: dict[Stage, list[float]] = defaultdict(list)
    for fault in all_faults:
        for stage, took in fault.steps_us().items():
            steps[stage].append(took)
    return {
        "faults": len(all_faults),
        "steps": {stage.name.lower(): {"mean_us": mean(took), "p50_us": median(took)} for stage, took in steps.items()},
    }


def picture(told: dict[str, Any]) -> str:
    """The summary as bars, each step where the one before ended."""
    steps = [(Stage[name.upper()], figures) for name, figures in told["steps"].items()]
    whole = sum(figures["mean_us"] for _, figures in steps) or 1.0
    lines, at = [], 0.0
    for stage, figures in steps:
        begin, at = round(at / whole * BAR), at + figures["mean_us"]
        bar = " " * begin + "█" * max(1, round(at / whole * BAR) - begin)
        lines.append(f"{STEPS[stage]:22}{bar:{BAR + 1}}{figures['mean_us']:8.1f}{figures['p50_us']:8.1f}")
    head = f"{told['faults']} faults".ljust(BAR + 23) + f"{'mean':>8}{'p50':>8}  µs"
    return "\n".join([head, *lines, f"{'':{BAR + 23}}{whole:8.1f}"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gmemd.stages", description="Where the time of faults goes.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=f"of one migration, *{SUFFIX}")
    parser.add_argument("--json", action="store_true", help="every fault: region, page, ns at each stage")
    options = parser.parse_args(arguments)
    try:
        found = faults(read(options.files))
    except DataError as error:
        print(f"stages: {error}", file=sys.stderr)
        return error.exit_code
    if options.json:
        each = [
            {"region": fault.region, "page": fault.page, "at_ns": {s.name.lower(): t for s, t in fault.at.items()}}
            for fault in found
        ]
        print(json.dumps(summary(found) | {"each": each}))
    else:
        print(picture(summary(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
