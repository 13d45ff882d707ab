"""The command: so many runs of each kind, some at a time; one line each, and the counts."""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import trio

from gmemd import cli
from gmemd_tools.soak.faults import KINDS
from gmemd_tools.soak.run import Result, run

DEADLINE = 30.0
KEPT = Path("build/soak")


def parser() -> argparse.ArgumentParser:
    """All options."""
    top = cli.Parser(prog="make soak", description="Many small migrations, each with a fault at a random byte.")
    top.add_argument("--runs", type=int, default=10, metavar="N", help="of each kind (10)")
    top.add_argument("--kind", action="append", choices=KINDS, help="only this kind; repeatable")
    top.add_argument("--seed", type=int, default=1, metavar="N", help="of the first run; the next has the next (1)")
    top.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="at a time (one a CPU)")
    top.add_argument("--deadline", type=float, default=DEADLINE, metavar="SECONDS", help=f"of a run ({DEADLINE:g})")
    top.add_argument(
        "--keep", type=Path, default=KEPT, metavar="DIR", help=f"where to leave the logs of failed runs ({KEPT})"
    )
    top.add_argument("--json", action="store_true", help="a JSON object a run, and one with the counts")
    return top


async def _soak(options: argparse.Namespace) -> list[Result]:
    results: list[Result] = []
    places = trio.Semaphore(options.jobs)

    async def one(kind: str, seed: int) -> None:
        result = await run(kind, seed, options.deadline, options.keep)
        places.release()
        results.append(result)
        _tell(result, as_json=options.json)

    async with trio.open_nursery() as nursery:
        for seed in range(options.seed, options.seed + options.runs):
            for kind in options.kind or KINDS:
                await places.acquire()
                nursery.start_soon(one, kind, seed)
    return results


def _tell(result: Result, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(result)), flush=True)
        return
    at = " ".join(f"{fault['kind']}@{fault['byte']}" for fault in result.faults)
    end = f"{result.recoveries} recoveries" if result.ok else f"FAILED: {result.error} {result.kept}"
    print(f"{result.kind:15} seed {result.seed:<6} {result.seconds:6.2f} s  {at}  {end}", flush=True)


def count(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Of each kind: runs, how many were fine, in how many the fault came in time, recoveries, seconds."""
    counts = {}
    for kind in dict.fromkeys(result.kind for result in results):
        of_kind = [result for result in results if result.kind == kind]
        counts[kind] = {
            "runs": len(of_kind),
            "ok": sum(result.ok for result in of_kind),
            "struck": sum(result.struck > 0 for result in of_kind),
            "recoveries": sum(result.recoveries for result in of_kind),
            "median_s": round(statistics.median(result.seconds for result in of_kind), 2),
            "max_s": round(max(result.seconds for result in of_kind), 2),
        }
    return counts


def soak(options: argparse.Namespace) -> int:
    """Returns 0 only if every run was fine."""
    results = trio.run(_soak, options)
    counts = count(results)
    if options.json:
        print(json.dumps({"counts": counts}))
    else:
        for kind, values in counts.items():
            print(f"{kind:15}", "  ".join(f"{name} {value:g}" for name, value in values.items()))
    return 0 if all(result.ok for result in results) else os.EX_SOFTWARE


if __name__ == "__main__":
    sys.exit(cli.run(parser(), soak, None))
