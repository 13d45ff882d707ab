"""A run in arrays, as the pictures want it."""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gmemd_tools.replay.runfile import Run

MIB = 1 << 20
Numbers: TypeAlias = NDArray[np.float64]
Flags: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True)
class Data:
    """One run. `at` and `took` in s and µs, `place` in MiB from the first region's start, all of every access."""

    name: str
    result: dict[str, Any]
    at: Numbers
    took: Numbers
    place: Numbers
    thread: NDArray[np.int64]
    waited: Flags
    memory_mib: float
    looks: list[tuple[float, dict[str, Any]]]

    @property
    def waits(self) -> Numbers:
        """µs of each wait."""
        return self.took[self.waited]

    @property
    def seconds(self) -> float:
        """From the first access to the end of the last."""
        return float(self.result["duration_us"]) / 1e6

    @property
    def threads(self) -> list[int]:
        return [int(thread["thread"]) for thread in self.result["threads"]]

    def waited_share(self, thread: int) -> float:
        """Of the run's time, how much this thread waited for pages."""
        own = self.waited & (self.thread == thread)
        return float(self.took[own].sum()) / 1e6 / self.seconds if self.seconds else 0.0


def data_of(run: Run) -> Data:
    """All regions stand one after another, without the holes between them."""
    starts = np.cumsum([0, *(pages * size for _, pages, size in run.regions)])
    sizes = np.array([size for *_, size in run.regions])
    region = np.array([touch.region for touch in run.touches], dtype=np.int64)
    page = np.array([touch.page for touch in run.touches], dtype=np.int64)
    return Data(
        name=run.name,
        result=run.result,
        at=np.array([touch.began_ns for touch in run.touches]) / 1e9,
        took=np.array([touch.took_ns for touch in run.touches]) / 1e3,
        place=(starts[region] + page * sizes[region]) / MIB,
        thread=np.array([touch.thread for touch in run.touches], dtype=np.int64),
        waited=np.array([touch.waited for touch in run.touches], dtype=np.bool_),
        memory_mib=float(starts[-1]) / MIB,
        looks=[(time / 1e9, told) for time, told in run.looks],
    )
