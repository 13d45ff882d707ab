"""The ratios that have to hold, in one place. Each is taken within one repetition; the median of all is what counts."""

from dataclasses import dataclass
from statistics import median

# A median of a few short runs on a machine with two cores moves by about this much without any change in the code.
TOLERANCE = 0.15


@dataclass(frozen=True, slots=True)
class Limit:
    """A figure of ours over one that it is measured against (None: the figure itself), and how large it may be."""

    title: str
    figure: str
    against: str | None
    limit: float
    at_least: bool = False
    instead: str | None = None  # of ours, in a run that has not got the figure

    def ratios(self, runs: list[dict[str, float]]) -> list[float]:
        """One for each repetition that has both figures."""
        return [
            ours / (run[self.against] if self.against else 1.0)
            for run in runs
            if (ours := run.get(self.figure, run.get(self.instead or self.figure))) is not None
            and (self.against is None or run.get(self.against))
        ]

    def holds(self, ratios: list[float], tolerance: float = 0.0) -> bool:
        if self.at_least:
            return median(ratios) >= self.limit * (1 - tolerance)
        return median(ratios) <= self.limit * (1 + tolerance)


FLOOR = "floor polling, 1 threads"
LARGE = ", large folios"  # of both ends' memory files; QEMU's is its own
HANDLED = ", read to continued"  # by the daemon's clock, as QEMU measures it


def _beside_qemu(kind: str = "") -> list[Limit]:
    """Of a guest on a vCPU, as QEMU's is; a thread stands in for it where there is no KVM. Memory of one kind."""

    def limit(title: str, pattern: str, figure: str, against: str | None, most: float) -> Limit:
        name = f"busy {pattern}{{}}{kind}{figure}"
        return Limit(f"{title}{kind}", name.format(", vCPU"), against, most, instead=name.format(""))

    clock = ", guest's clock: mean"
    return [
        limit("mean wait a fault against QEMU's, random", "random", f"{HANDLED}: mean", "QEMU random: mean", 0.1),
        limit("the same, sequential", "sequential", f"{HANDLED}: mean", "QEMU sequential: mean", 0.67),
        limit("by the guests' own clocks, random", "random", ": mean", f"QEMU random{clock}", 0.1),
        limit("the same, sequential", "sequential", ": mean", f"QEMU sequential{clock}", 0.67),
        limit("share blocked, random touches, by its own clock", "random", ": share blocked", None, 0.3),
        limit("total time against QEMU's", "random", ": total", "QEMU random: total", 0.67),
    ]


def _beside_streams(kind: str = "") -> list[Limit]:
    """Of the background alone. Memory of one kind."""
    lanes = (1, 2, 4)
    return [
        *(Limit(f"background throughput, {n} lanes, against plain streams{kind}", f"{n} lanes{kind}: bytes/s",
                f"stream of {n}{kind}: bytes/s", 0.9, at_least=True) for n in lanes),
        *(Limit(f"CPU a GiB, {n} lanes, against plain streams{kind}", f"{n} lanes{kind}: CPU s/GiB",
                f"stream of {n}{kind}: CPU s/GiB", 1.25) for n in lanes),
    ]  # fmt: skip


LIMITS = [
    Limit("fault p50, 1 thread, against the polling floor", "idle, 1 threads: p50", f"{FLOOR}: p50", 1.25),
    Limit("fault p99, the same", "idle, 1 threads: p99", f"{FLOOR}: p99", 1.5),
    Limit("mean fault, background saturating against without", "busy random: mean", "idle, 1 threads: mean", 2.0),
    *_beside_qemu(),
    *_beside_streams(),
    *(Limit(f"pages/s, {b} threads against {a}", f"idle, {b} threads: pages/s", f"idle, {a} threads: pages/s", 1.0,
            at_least=True) for a, b in ((1, 2), (2, 4), (4, 8))),
    Limit("background throughput with TLS, against plain text", "TLS, 2 lanes: bytes/s", "plain, 2 lanes: bytes/s", 0.6,
          at_least=True),
    Limit("fault p50 with TLS, the same", "TLS, idle, 1 thread: p50", "plain, idle, 1 thread: p50", 1.3),
    *_beside_qemu(LARGE),
    *_beside_streams(LARGE),
]  # fmt: skip
