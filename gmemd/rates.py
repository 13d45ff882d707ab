"""How fast a migration goes, over the last seconds."""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple, Self

# One a second: long enough to be steady, short enough to show a stall while it lasts.
WINDOW = 5


class Sample(NamedTuple):
    """What has been counted until a time of CLOCK_MONOTONIC in seconds."""

    at: float
    pages: int  # received, however they came
    arrived: int  # bytes of pages that came over lanes
    faults: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Each is per second."""

    pages: float = 0.0
    arrived: float = 0.0
    faults: float = 0.0

    @classmethod
    def between(cls, old: Sample, new: Sample) -> Self:
        seconds = new.at - old.at
        if seconds <= 0:
            return cls()
        pages, arrived, faults = (max(b - a, 0) / seconds for a, b in zip(old[1:], new[1:], strict=True))
        return cls(pages, arrived, faults)


@dataclass(slots=True)
class Rates:
    """The samples of one migration: the daemon takes one a second, whoever asks compares with the oldest."""

    samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def take(self, pages: int, arrived: int, faults: int) -> None:
        self.samples.append(Sample(time.monotonic(), pages, arrived, faults))

    def speed(self, pages: int, arrived: int, faults: int) -> Speed:
        """From the oldest sample until now."""
        if not self.samples:
            return Speed()
        return Speed.between(self.samples[0], Sample(time.monotonic(), pages, arrived, faults))
