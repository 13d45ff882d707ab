"""Run `gmemd doctor` and tests under each kernel of the matrix; what came of it goes into one JSON file a kernel.

usage: python3 -m tools.lab.matrix [-k KERNEL]... [-- PYTEST-ARGUMENT...]
"""

import argparse
import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tools.lab.failure import LabError
from tools.lab.kernels import LAB, NATIVE, Kernel, debian

CHECKOUT = Path(__file__).resolve().parents[2]
BUILD = CHECKOUT / "build/lab"
RESULTS = BUILD / "matrix"
SECONDS = 7200  # for one kernel

# The oldest kernel of a supported Debian, which has MINOR on shmem, and the newest one.
KERNELS: dict[str, Callable[[], Kernel]] = {
    "native": lambda: NATIVE,
    "lab": lambda: LAB,
    "debian-bookworm": partial(debian, "bookworm", BUILD / "debian-bookworm"),
    "debian-sid": partial(debian, "sid", BUILD / "debian-sid"),
}

# Huge pages only where it is nobody's machine, and only for the doctor, as tests reserve what they need.
INSIDE = """
pool() { if [ -e /run/lab-command ]; then echo $1 >/proc/sys/vm/nr_hugepages; fi; }
export HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis
out=$1; shift
uname -r >"$out/release"
pool 8; .venv/bin/gmemd doctor --json >"$out/doctor.json"; pool 0
exec .venv/bin/python -m pytest --junitxml="$out/tests.xml" "$@"
"""
# What hangs on a host for 2 minutes may only be slow in an emulated machine.
PYTEST = ("-q", "--tb=short", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=900")


def run(kernel: Kernel, out: Path, tests: list[str]) -> int:
    """The exit status of pytest, or the one that tells why it did not come so far."""
    command = ["/bin/sh", "-c", INSIDE, "sh", str(out), *PYTEST, *tests]
    if kernel.options is not None:
        runner = [str(CHECKOUT / "tools/lab/run"), "-t", str(SECONDS), "-w", str(out), *kernel.options, "--"]
        command = [*runner, *command]
    return subprocess.run(command, cwd=CHECKOUT).returncode


def outcome(case: ET.Element) -> dict[str, str]:
    name = f"{case.get('classname')}::{case.get('name')}"
    for kind, word in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(kind)
        if found is not None:
            return {"name": name, "outcome": word, "why": found.get("message", "")}
    return {"name": name, "outcome": "passed", "why": ""}


def measured(case: ET.Element) -> dict[str, float]:
    return {f"{found.get('name')}": float(found.get("value", "nan")) for found in case.iter("property")}


def collect(name: str, out: Path) -> dict[str, object]:
    """What the files in `out` say. One that is absent or half-written says nothing."""
    release, doctor, tests = out / "release", out / "doctor.json", out / "tests.xml"
    cases = list(ET.parse(tests).iter("testcase")) if tests.exists() else []
    text = doctor.read_text() if doctor.exists() else ""
    return {
        "name": name,
        "release": release.read_text().strip() if release.exists() else None,
        "doctor": json.loads(text) if text else None,
        "tests": [outcome(case) for case in cases],
        "measured": {key: value for case in cases for key, value in measured(case).items()},
    }


def visit(name: str, tests: list[str]) -> int:
    out = RESULTS / name
    subprocess.run(["rm", "-rf", out], check=True)
    out.mkdir(parents=True)
    print(f"=== {name}", flush=True)
    kernel = KERNELS[name]()
    start = time.monotonic()
    status = run(kernel, out, tests)
    result = collect(name, out) | {"status": status, "seconds": round(time.monotonic() - start, 1)}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return status


def main() -> int:
    """0 if each kernel could be visited, whatever its tests said: the table tells that."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", dest="kernels", action="append", choices=list(KERNELS))
    parser.add_argument("tests", nargs="*", default=["tests"])
    args = parser.parse_args()
    try:
        statuses = {name: visit(name, args.tests) for name in args.kernels or KERNELS}
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return error.status
    print(" ".join(f"{name}: {status}" for name, status in statuses.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
