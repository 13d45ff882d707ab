"""Run `gmemd doctor` and tests under each kernel of the matrix; what came of it goes into one JSON file a kernel.

usage: python3 -m tools.lab.matrix [-k KERNEL]... [-j MACHINES] TEST-FILE...
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tools.lab import suite
from tools.lab.failure import LabError
from tools.lab.kernels import LAB, NATIVE, Kernel, debian
from tools.lab.suite import CHECKOUT, Ran

BUILD = CHECKOUT / "build/lab"
RESULTS = BUILD / "matrix"
DOCTOR_SECONDS = 300

# The oldest kernel of a supported Debian, which has MINOR on shmem, and the newest one.
KERNELS: dict[str, Callable[[], Kernel]] = {
    "native": lambda: NATIVE,
    "lab": lambda: LAB,
    "debian-bookworm": partial(debian, "bookworm", BUILD / "debian-bookworm"),
    "debian-sid": partial(debian, "sid", BUILD / "debian-sid"),
}

# Huge pages only where it is nobody's machine, and only for the doctor, as tests reserve what they need.
EXAMINE = """
if [ -e /run/lab-command ]; then echo 8 >/proc/sys/vm/nr_hugepages; fi
uname -r >"$1/release"
exec .venv/bin/gmemd doctor --json >"$1/doctor.json"
"""


def examine(kernel: Kernel, out: Path) -> None:
    """Has the doctor look at it."""
    command = ["/bin/sh", "-c", EXAMINE, "sh", str(out)]
    if kernel.options is not None:
        runner = [str(CHECKOUT / "tools/lab/run"), "-t", str(DOCTOR_SECONDS), "-w", str(out), *kernel.options, "--"]
        command = [*runner, *command]
    subprocess.run(command, cwd=CHECKOUT)


def run_here(out: Path, files: Sequence[str]) -> Ran:
    """All of them in one process, as in `make test`."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--junitxml={out}/tests.xml", *files]
    start = time.monotonic()
    with (out / "log").open("wb") as log:
        done = subprocess.run(command, cwd=CHECKOUT, stdout=log, stderr=log)
    return Ran("all", done.returncode, time.monotonic() - start, out)


def run(kernel: Kernel, out: Path, files: Sequence[str], machines: int) -> list[Ran]:
    if kernel.options is None:
        return [run_here(out, files)]
    return list(suite.told(suite.run_files(kernel, out / "tests", files, (), machines)))


def visit(name: str, files: Sequence[str], machines: int) -> None:
    out = RESULTS / name
    subprocess.run(["rm", "-rf", out], check=True)
    out.mkdir(parents=True)
    print(f"=== {name}", flush=True)
    kernel = KERNELS[name]()
    start = time.monotonic()
    examine(kernel, out)
    runs = run(kernel, out, files, machines)
    release, doctor = out / "release", out / "doctor.json"
    told = doctor.read_text() if doctor.exists() else ""
    cases = [case for ran in runs for case in ran.cases]
    result = {
        "name": name,
        "release": release.read_text().strip() if release.exists() else None,
        "doctor": json.loads(told) if told else None,
        "tests": [{"name": case.name, "outcome": case.outcome, "why": case.why} for case in cases],
        "measured": {key: value for case in cases for key, value in case.measured.items()},
        "broken": [ran.file for ran in runs if not ran.cases],
        "seconds": round(time.monotonic() - start, 1),
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def main() -> int:
    """0 if each kernel could be visited, whatever its tests said: the table tells that."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", dest="kernels", action="append", choices=list(KERNELS))
    parser.add_argument("-j", dest="machines", type=int, default=os.cpu_count() or 1, metavar="MACHINES")
    parser.add_argument("files", nargs="+", metavar="TEST-FILE")
    args = parser.parse_args()
    try:
        for name in args.kernels or KERNELS:
            visit(name, args.files, args.machines)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
