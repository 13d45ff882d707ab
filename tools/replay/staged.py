"""The stages of a replay's faults: what both ends stamped, between the touch and the moment when the thread ran on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gmemd import stages
from gmemd.stages import Stage
from gmemd.trace import RECORD
from gmemd_tools.replay.guest import Played
from gmemd_tools.replay.recording import Recording

Stamp = tuple[int, Stage, int, int]  # ns, stage, region, page


def told(directory: Path, recording: Recording, played: Sequence[Played]) -> dict[str, Any]:
    """The mean and median of each step, of the latest faults. An end that was killed has left nothing."""
    files = sorted(directory.glob(f"*{stages.SUFFIX}"))
    return stages.summary(stages.faults(sorted([*stages.read(files), *_stamps(recording, played)])))


def _stamps(recording: Recording, played: Sequence[Played]) -> list[Stamp]:
    """The guest's own."""
    threads = recording.threads()
    found: list[Stamp] = []
    for thread in played:
        accesses = RECORD.iter_unpack(threads[thread.thread])
        for (_, page, _, region, _), (began, took, waited) in zip(accesses, thread.touches, strict=False):
            if waited:
                found += [(began, Stage.TOUCHED, region, page), (began + took, Stage.RUNNING, region, page)]
    return found
