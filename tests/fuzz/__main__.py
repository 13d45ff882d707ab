"""`make fuzz`: every target for its share of the time, driven by libFuzzer, the C ones under sanitizers.

What is found goes to build/fuzz; `--keep` puts the smallest set of inputs that reaches as much into corpus/.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fuzz import natively, targets

HERE = Path(__file__).parent
BUILD = natively.TREE / "build/fuzz"
CORPUS = HERE / "corpus"
DEFAULT_SECONDS = 120
LONGEST_INPUT = 4096
SLOWEST_INPUT = 10  # seconds: more is a hang
MOST_MEMORY = 2048  # MiB: more is a leak
NICE = ("nice", "-n", "15")


class Outcome(NamedTuple):
    target: str
    code: int
    inputs: int
    covered: int


def command(name: str) -> list[str]:
    if name in natively.TARGETS:
        return [*NICE, str(BUILD / "bin" / name)]
    return [*NICE, sys.executable, "-m", "fuzz.drive", name]


def fuzz(name: str, seconds: int) -> Outcome:
    """One target. What it printed is kept beside what it found."""
    found = BUILD / name
    found.mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={LONGEST_INPUT}",
        f"-timeout={SLOWEST_INPUT}",
        f"-rss_limit_mb={MOST_MEMORY}",
        f"-artifact_prefix={BUILD}/{name}-",
        "-print_final_stats=1",
    ]
    log = BUILD / f"{name}.log"
    with log.open("wb") as out:
        run = [*command(name), *options, str(found), str(CORPUS / name)]
        code = subprocess.run(run, stdout=out, stderr=out, check=False).returncode
    text = log.read_text(errors="replace")
    inputs = re.findall(r"number_of_executed_units: (\d+)", text)
    covered = re.findall(r" cov: (\d+)", text)
    return Outcome(name, code, int(inputs[-1]) if inputs else 0, int(covered[-1]) if covered else 0)


def keep(name: str) -> None:
    """The smallest set of what was found and what is kept already."""
    kept, merged = CORPUS / name, BUILD / f"{name}.merged"
    merged.mkdir(exist_ok=True)
    kept.mkdir(parents=True, exist_ok=True)
    run = [*command(name), "-merge=1", f"-max_len={LONGEST_INPUT}", str(merged), str(kept), str(BUILD / name)]
    subprocess.run(run, check=True, stderr=subprocess.DEVNULL)
    assert any(merged.iterdir()), f"{name}: nothing was merged"
    for old in kept.iterdir():
        old.unlink()
    for new in merged.iterdir():
        new.rename(kept / new.name[:12])
    merged.rmdir()


def main(arguments: Sequence[str]) -> int:
    names = [*natively.TARGETS, *targets.TARGETS]
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("seconds", type=int, nargs="?", default=DEFAULT_SECONDS, help="for all targets together")
    parser.add_argument("--target", action="append", choices=names, help="only this one; repeatable")
    parser.add_argument("--keep", action="store_true", help="put what was found into tests/fuzz/corpus")
    options = parser.parse_args(arguments)
    natively.build(BUILD / "bin", ("clang", "-fsanitize=fuzzer-no-link"), ("-fsanitize=fuzzer",), ("fuzz",))
    chosen = options.target or names
    outcomes = [fuzz(name, max(1, options.seconds // len(chosen))) for name in chosen]
    for outcome in outcomes:
        verdict = "ok" if outcome.code == 0 else f"FAILED, see {BUILD / outcome.target}.log"
        print(f"{outcome.target:15} {outcome.inputs:10} inputs  {outcome.covered:5} covered  {verdict}")
    print(f"{'all':15} {sum(outcome.inputs for outcome in outcomes):10} inputs")
    if any(outcome.code for outcome in outcomes):
        return 1
    if options.keep:
        for name in chosen:
            keep(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
