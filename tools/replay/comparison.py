"""Two ways of playing one recording, by turns, so that what else the host does meets both alike."""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from gmemd.errors import DataError
from gmemd_tools.replay.recording import Recording
from gmemd_tools.replay.run import replay
from gmemd_tools.replay.setup import Setup

# What is compared, and how it is got from a result. Of all of them, less is better.
FIGURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "faults": lambda found: float(found["faults"]),
    "asked_pages": lambda found: float(found["daemon"]["counters"]["urgent_pages"]),
    "fault_p50_us": lambda found: float(found["fault_latency_us"]["p50"]),
    "fault_p99_us": lambda found: float(found["fault_latency_us"]["p99"]),
    "fault_max_us": lambda found: float(found["fault_latency_us"]["max"]),
    "waited_us": lambda found: sum(float(thread["waited_us"]) for thread in found["threads"]),
    "settled_us": lambda found: float(found["settled_us"]),
    "duration_us": lambda found: float(found["duration_us"]),
}


def compare(recording: Recording, a: Setup, b: Setup, rounds: int, keep: Path | None = None) -> dict[str, Any]:
    """A B A B …; the results of all runs, and of each figure the medians and the range."""
    results: dict[str, list[dict[str, Any]]] = {"a": [], "b": []}
    if keep:
        try:
            keep.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{keep}: {error.strerror}") from None
    for number in range(1, rounds + 1):
        for name, setup in (("a", a), ("b", b)):
            results[name].append(replay(recording, setup, keep / f"{name}{number}.gmrun" if keep else None))
    return {"figures": {name: _figure(read, results) for name, read in FIGURES.items()}, **results}


def _figure(read: Callable[[dict[str, Any]], float], results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    seen = {name: [read(found) for found in runs] for name, runs in results.items()}
    a, b = median(seen["a"]), median(seen["b"])
    told = {
        name: {"median": median(values), "least": min(values), "most": max(values)} for name, values in seen.items()
    }
    apart = max(seen["a"]) < min(seen["b"]) or max(seen["b"]) < min(seen["a"])
    return {**told, "change": round(b / a - 1, 4) if a else None, "apart": apart}


def text(compared: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{'medians of ' + str(len(compared['a'])):<16}{'a':>14}{'b':>14}{'change':>10}"]
    for name, figure in compared["figures"].items():
        change = "" if figure["change"] is None else f"{figure['change']:+.1%}"
        sure = "" if figure["apart"] else "  within what runs differ by"
        lines.append(f"{name:<16}{figure['a']['median']:>14.1f}{figure['b']['median']:>14.1f}{change:>10}{sure}")
    return "\n".join(lines)
