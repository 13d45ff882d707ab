"""Run test files under a kernel, each in a machine of its own, as many machines at a time as this host has CPUs.

usage: python3 -m tools.lab.suite [-j MACHINES] TEST-FILE... [-- PYTEST-ARGUMENT...]

A kernel that stops takes only one file with it. What each run wrote, and its tests.xml, stay in build/lab/suite.
"""

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tools.lab.cli import default_kernel
from tools.lab.failure import LabError
from tools.lab.kernels import LAB, Kernel

CHECKOUT = Path(__file__).resolve().parents[2]
OUT = CHECKOUT / "build/lab/suite"
SECONDS = 1200  # for one file; the longest take a fourth of it where nothing else runs
NO_TESTS = 5  # pytest's status where all were deselected
GOOD = (0, NO_TESTS)

# What hangs on a host for 2 minutes may only be slow in an emulated machine.
PYTEST = ("-q", "--tb=short", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=600")
VARIABLES = ("-e", "HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis")


@dataclass(frozen=True)
class Case:
    """One test."""

    name: str
    outcome: str
    why: str
    seconds: float
    measured: dict[str, float]


def read_case(case: ET.Element) -> Case:
    outcome, why = "passed", ""
    for kind, word in (("skipped", "skipped"), ("error", "failed"), ("failure", "failed")):
        if (found := case.find(kind)) is not None:
            outcome, why = word, found.get("message", "")
    name = f"{case.get('classname')}::{case.get('name')}"
    measured = {f"{found.get('name')}": float(found.get("value", "nan")) for found in case.iter("property")}
    return Case(name, outcome, why, float(case.get("time", "0")), measured)


@dataclass(frozen=True)
class Ran:
    """One file, and what became of it."""

    file: str
    status: int
    seconds: float
    folder: Path

    @cached_property
    def cases(self) -> list[Case]:
        path = self.folder / "tests.xml"
        return [read_case(case) for case in ET.parse(path).iter("testcase")] if path.exists() else []

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def __str__(self) -> str:
        said = tally(case.outcome for case in self.cases)
        status = "" if self.status in GOOD else f", status {self.status}"
        return f"{self.seconds:5.0f} s  {self.file}: {said}{status}"


def tally(outcomes: Iterable[str]) -> str:
    counts = Counter(outcomes)
    return ", ".join(f"{counts[word]} {word}" for word in ("passed", "failed", "skipped") if counts[word]) or "no tests"


def run_file(kernel: Kernel, out: Path, more: Sequence[str], file: str) -> Ran:
    """`kernel` is one that has to be booted."""
    folder = out / Path(file).stem
    folder.mkdir(parents=True)
    command = [str(CHECKOUT / "tools/lab/run"), "-t", str(SECONDS), "-w", str(folder), *VARIABLES]
    command += [*(kernel.options or ()), "--", str(CHECKOUT / ".venv/bin/python"), "-m", "pytest", *PYTEST, *more]
    start = time.monotonic()
    with (folder / "log").open("wb") as log:
        done = subprocess.run([*command, f"--junitxml={folder}/tests.xml", file], stdout=log, stderr=log, cwd=CHECKOUT)
    return Ran(file, done.returncode, time.monotonic() - start, folder)


def run_files(kernel: Kernel, out: Path, files: Sequence[str], more: Sequence[str], machines: int) -> Iterator[Ran]:
    """As each comes to its end."""
    subprocess.run(["rm", "-rf", out], check=True)
    with ThreadPoolExecutor(machines) as pool:
        started = [pool.submit(run_file, kernel, out, more, file) for file in files]
        try:
            yield from (ended.result() for ended in as_completed(started))
        finally:
            pool.shutdown(cancel_futures=True)  # who interrupts one means all


def told(runs: Iterable[Ran]) -> Iterator[Ran]:
    """As they are, a line each."""
    for ran in runs:
        print(ran, flush=True)
        yield ran


def summary(runs: Sequence[Ran]) -> str:
    """What failed, and how; why tests were skipped; the sum."""
    lines = [f"--- {ran.file}\n{ran.log}" for ran in runs if ran.status not in GOOD]
    cases = [case for ran in runs for case in ran.cases]
    reasons = Counter(case.why for case in cases if case.outcome == "skipped")
    lines += [f"skipped, {count}: {why}" for why, count in sorted(reasons.items())]
    return "\n".join([*lines, tally(case.outcome for case in cases)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-j", dest="machines", type=int, default=os.cpu_count() or 1, metavar="MACHINES")
    parser.add_argument("files", nargs="+", metavar="TEST-FILE")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, more = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    try:
        default_kernel()
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return error.status
    start = time.monotonic()
    runs = list(told(run_files(LAB, OUT, args.files, more, args.machines)))
    print(f"{summary(runs)} in {time.monotonic() - start:.0f} s")
    return 0 if all(ran.status in GOOD for ran in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
