"""A replay over a network that delays, reorders and loses packets, by the kernel's netem."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gmemd.errors import UnavailableError
from gmemd.native.memory import Region
from gmemd.trace import TraceWriter
from gmemd_tools.network.conditions import parse
from gmemd_tools.replay import patterns
from gmemd_tools.replay.recording import load
from gmemd_tools.replay.run import replay
from gmemd_tools.replay.setup import Setup

PAGES = 1024
ROUND_TRIP_US = 10_000


@pytest.mark.parametrize("network", ["latency=5ms", "latency=7ms,jitter=4ms,loss=1%"])
def test_replay_over_netem(tmp_path: Path, lacking: Callable[[str], None], network: str) -> None:
    path = tmp_path / "zipf.gmtrace"
    plan = patterns.Plan(pages=PAGES, threads=2, faults=100, gap_ns=2_000_000, writes=0.3, seed=1)
    with TraceWriter(path, "m", [Region(offset=0, size=PAGES * 4096, page_size=4096, gpa=0)]) as writer:
        writer.add(patterns.synthesise("zipf", plan))
    try:
        told = replay(load([path]), Setup(network=parse(f"{network},by=kernel")))
    except UnavailableError as error:
        if not str(error).startswith("--network by=kernel: "):
            raise
        lacking(str(error))
        return
    assert told["pages_verified"] == PAGES
    assert told["fault_latency_us"]["max"] > ROUND_TRIP_US
