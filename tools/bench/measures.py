"""What is measured. Each measure runs once a repetition and returns figures by name: times in µs, rates by second."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from gmemd_tools.bench import ours, qemu
from gmemd_tools.bench.content import memory_file
from gmemd_tools.bench.programs import Result, run

GIB = 1 << 30
IDLE_MEMORY = 256 << 20  # of which only FAULTS pages are touched
FAULTS = 4000  # a run of the fault path; a p99 is then that of 40 faults
FLOOR_THREADS = (1, 4)
THREADS = (1, 2, 4, 8)
LANES = (1, 2, 4)
PATTERNS = {"random": ("--random",), "sequential": ()}

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Bench:
    """What the measures share: a folder, content to move, how much of it, a daemon to move it to."""

    folder: Path
    content: Path
    memory: int
    daemon: ours.Daemon


@contextmanager
def bench(memory: int) -> Iterator[Bench]:
    """Everything set up, for guests of `memory` bytes."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="gmemd-bench-")))
        content = stack.enter_context(memory_file(memory))
        yield Bench(folder, content, memory, stack.enter_context(ours.daemon(folder)))


def floor(b: Bench) -> Figures:
    """The least that a fault can take here, and the same with both processes asleep in between."""
    figures: Figures = {}
    for threads in FLOOR_THREADS:
        for name, how in ("polling", ()), ("sleeping", ("--sleep",)):
            told = run("floor", "--memory", IDLE_MEMORY, "--source", b.content, "--random", "--touches", FAULTS,
                       "--threads", threads, *how)  # fmt: skip
            figures |= _waits(f"floor {name}, {threads} threads", told)
    return figures


def idle(b: Bench) -> Figures:
    """Faults with nothing else on the line."""
    figures: Figures = {}
    for threads in THREADS:
        told = b.daemon.move(b.content, b.memory, "--random", "--touches", FAULTS, "--threads", threads,
                             source=("--no-background",))  # fmt: skip
        figures |= _waits(f"idle, {threads} threads", told["guest"])
        figures["time to ready"] = told["ready_us"]
    return figures


def busy(b: Bench) -> Figures:
    """Whole migrations of a guest that touches as fast as it can."""
    figures: Figures = {}
    for pattern, how in PATTERNS.items():
        told = b.daemon.move(b.content, b.memory, *how)
        total = told["source"]["duration_us"]
        figures |= _waits(f"busy {pattern}", told["guest"])
        figures[f"busy {pattern}: total"] = total
        figures[f"busy {pattern}: share blocked"] = told["guest"]["wait_us"]["sum"] / total
    return figures


def peer(b: Bench) -> Figures:
    """The same in QEMU."""
    figures: Figures = {}
    for pattern in PATTERNS:
        told = qemu.move(b.folder, b.memory, random=pattern == "random")
        figures[f"QEMU {pattern}: mean"] = told["wait_us"]
        figures[f"QEMU {pattern}: count"] = told["requests"]
        figures[f"QEMU {pattern}: total"] = told["total_us"]
        figures[f"QEMU {pattern}: share blocked"] = told["blocked_share"]
    return figures


def lanes(b: Bench) -> Figures:
    """The background alone, beside plain streams."""
    figures: Figures = {}
    for count in LANES:
        plain = run("stream", "--memory", b.memory, "--source", b.content, "--threads", count)
        figures |= _throughput(f"stream of {count}", b.memory, plain["duration_us"] / 1e6, plain)
        told = b.daemon.move(b.content, b.memory, "--touches", 1, source=("--lanes", count))
        told["destination_cpu_s"] = told["daemon_cpu_s"]
        figures |= _throughput(f"{count} lanes", b.memory, told["daemon"]["running_s"], told)
    return figures


def cost(b: Bench) -> Figures:
    """What filling a memory file takes by itself."""
    told = run("cost", "--memory", IDLE_MEMORY, "--source", b.content)
    return {f"cost: {name}": told[name] * GIB / IDLE_MEMORY for name in told if name.endswith("_us")}


MEASURES: dict[str, Callable[[Bench], Figures]] = {
    "floor": floor,
    "idle": idle,
    "busy": busy,
    "qemu": peer,
    "lanes": lanes,
    "cost": cost,
}


def _waits(name: str, told: Result) -> Figures:
    return {f"{name}: {key}": value for key, value in told["wait_us"].items() if key != "sum"} | {
        f"{name}: pages/s": told["faults_per_s"]
    }


def _throughput(name: str, memory: int, seconds: float, told: Result) -> Figures:
    source, destination = told["source_cpu_s"] * GIB / memory, told["destination_cpu_s"] * GIB / memory
    return {
        f"{name}: bytes/s": memory / seconds,
        f"{name}: CPU s/GiB, source": source,
        f"{name}: CPU s/GiB, destination": destination,
        f"{name}: CPU s/GiB": source + destination,
    }
