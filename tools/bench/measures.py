"""What is measured. Each measure runs once a repetition and returns figures by name: times in µs, rates by second."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory

from gmemd.native import check, lib
from gmemd.native.memory import Populate, native_populate
from gmemd.stages import SUFFIX, faults, read, summary
from gmemd_tools import tmpfs
from gmemd_tools.bench import ours, qemu
from gmemd_tools.bench.content import PAGE, memory_file, warm
from gmemd_tools.bench.limits import LARGE
from gmemd_tools.bench.link import missing as shaped_missing
from gmemd_tools.bench.link import shaped
from gmemd_tools.bench.programs import Result, image, kvm_missing, run
from gmemd_tools.demo.certificates import Authority

GIB = 1 << 30
IDLE_MEMORY = 256 << 20  # of which only FAULTS pages are touched
FAULTS = 4000  # a run of the fault path; a p99 is then that of 40 faults
FLOOR_THREADS = (1, 4)
THREADS = (1, 2, 4, 8)
LANES = (1, 2, 4)
AHEAD = (0, 16, 63)  # pages at most; 16 is what a source does unless told otherwise
THINK_NS = 20_000
VCPU = ", vCPU"
LINKS = (1000, 4000)  # Mbit/s
LINK_THINK_NS = 200_000
LINK_SETTINGS = 'tls = "off"\nplain_text_on_network = true\n'  # of [network]: nobody else is on it
LINK_PLAIN = ("--tls", "off", "--plain-text-on-network")
SIZES = (256 << 20, 1 << 30, 4 << 30, 16 << 30, 1 << 40)
SPARSE_CONTENT = 64 << 20
STAGES_MEMORY = 16 << 20  # each page of it a fault, after which the migration is over
COST_MEMORY = 64 << 20
BACKINGS = {"memfd": 0, "hugetlb": 2 << 20}
PATTERNS = {"random": ("--random",), "sequential": ()}

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Bench:
    """What the measures share: a folder, content to move, how much of it, a daemon to move it to."""

    folder: Path
    content: Path
    memory: int
    daemon: ours.Daemon
    large: Path | None  # the same content in large folios, where there are such


@contextmanager
def bench(memory: int) -> Iterator[Bench]:
    """Everything set up, for guests of `memory` bytes."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="gmemd-bench-")))
        content = stack.enter_context(memory_file(memory))
        large = None if tmpfs.missing() else stack.enter_context(memory_file(memory, large_folios=True))
        yield Bench(folder, content, memory, stack.enter_context(ours.daemon(folder)), large)


def floor(b: Bench) -> Figures:
    """The least that a fault can take here, and the same with both processes asleep in between."""
    figures: Figures = {}
    for threads in FLOOR_THREADS:
        for name, how in ("polling", ()), ("sleeping", ("--sleep",)):
            warm(IDLE_MEMORY)
            told = run("floor", "--memory", IDLE_MEMORY, "--source", b.content, "--random", "--touches", FAULTS,
                       "--threads", threads, *how)  # fmt: skip
            figures |= _waits(f"floor {name}, {threads} threads", told)
    return figures


def idle(b: Bench) -> Figures:
    """Faults with nothing else on the line."""
    figures: Figures = {}
    for threads in THREADS:
        told = b.daemon.move(b.content, b.memory, "--random", "--touches", FAULTS, "--threads", threads,
                             source=("--no-background",), whole=False)  # fmt: skip
        figures |= _waits(f"idle, {threads} threads", told["guest"])
        figures["time to ready"] = told["ready_us"]
    if not kvm_missing():
        vcpu = image("binary", b.memory // PAGE, random=True, touches=FAULTS)
        told = b.daemon.move(b.content, b.memory, "--vcpu", vcpu, "--touches", FAULTS,
                             source=("--no-background",), whole=False)  # fmt: skip
        figures |= _waits(f"idle{VCPU}", told["guest"])
    return figures


def busy(b: Bench) -> Figures:
    """Whole migrations of a guest that touches as fast as it can."""
    figures: Figures = {}
    for pattern in PATTERNS:
        for guest, how in _guests(b, pattern).items():
            figures |= _whole(f"busy {pattern}{guest}", b.daemon.move(b.content, b.memory, *how))
    return figures


def peer(b: Bench) -> Figures:
    """The same in QEMU."""
    figures: Figures = {}
    for pattern in PATTERNS:
        told = qemu.move(b.folder, b.memory, random=pattern == "random")
        figures |= _of_qemu(f"QEMU {pattern}", told)
    return figures


def large_folios(b: Bench) -> Figures:
    """What `busy` and `lanes` measure, of memory files in large folios at both ends; of guests, that on a vCPU if there
    can be one."""
    figures: Figures = {}
    if not b.large:
        return figures
    backing = "--backing", "tmpfs"
    for pattern in PATTERNS:
        guest, how = _guests(b, pattern).popitem()
        figures |= _whole(f"busy {pattern}{guest}{LARGE}", b.daemon.move(b.large, b.memory, *how, *backing))
    for count in LANES[:2]:  # with four, both ends want more CPUs than most hosts that this runs on have
        figures |= _lanes(b, count, b.large, LARGE, *backing)
    return figures


def thinking(b: Bench) -> Figures:
    """The same guest beside QEMU's, when it does something with what it has read."""
    figures: Figures = {}
    for pattern in PATTERNS:
        name = f"thinking {pattern}"
        for guest, how in _guests(b, pattern, THINK_NS).items():
            figures |= _whole(f"{name}{guest}", b.daemon.move(b.content, b.memory, *how))
        if not qemu.missing():
            told = qemu.move(b.folder, b.memory, random=pattern == "random", think_ns=THINK_NS)
            figures |= _of_qemu(f"QEMU {name}", told)
    return figures


def ahead(b: Bench) -> Figures:
    """What the window ahead brings, by how the guest walks; nothing else is sent."""
    figures: Figures = {}
    for pattern, how in {**PATTERNS, "every third": ("--stride", 3)}.items():
        for window in AHEAD:
            told = b.daemon.move(b.content, b.memory, *how, "--touches", FAULTS,
                                 source=("--no-background", "--ahead", window), whole=False)["guest"]  # fmt: skip
            figures[f"ahead {window}, {pattern}: faults"] = told["wait_us"]["count"]
            figures[f"ahead {window}, {pattern}: µs a touch"] = told["touching_us"] / FAULTS
    return figures


def stages(b: Bench) -> Figures:
    """Where the time of a fault goes, with nothing else on the line."""
    folder = b.folder / "stages"
    settings = f'[trace]\ndirectory = "{folder}"\nstages = true\n'
    with memory_file(STAGES_MEMORY) as content, ours.daemon(folder, settings) as daemon:
        daemon.move(content, STAGES_MEMORY, "--random", "--touches", STAGES_MEMORY // PAGE,
                    "--stages", folder / f"guest{SUFFIX}",
                    source=("--no-background", "--stages", folder / f"source{SUFFIX}"))  # fmt: skip
    told = summary(faults(read(folder.glob(f"*{SUFFIX}"))))
    figures = {"stages: faults": float(told["faults"])}
    for step, took in told["steps"].items():
        figures |= {f"stages: {step}, {kind}": value for kind, value in took.items()}
    return figures


def growth(b: Bench) -> Figures:
    """What a larger guest costs: each with its own daemon, and with the same content, however large it is."""
    figures: Figures = {}
    for size in SIZES:
        name = f"guest of {size / GIB:g} GiB, {SPARSE_CONTENT >> 20} MiB of it in use"
        with memory_file(size, SPARSE_CONTENT) as content, ours.daemon(b.folder / "growth") as daemon:
            before = ours.own_memory(daemon.process.pid)
            told = daemon.move(content, size, "--touches", 1)
            figures[f"{name}: time to ready"] = told["ready_us"]
            figures[f"{name}: total"] = told["source"]["duration_us"]
            figures[f"{name}: daemon's memory"] = max(0, told["daemon_memory"] - before)
            figures[f"{name}: source's memory"] = told["source_memory"]
    return figures


def link(b: Bench) -> Figures:
    """A guest that touches every 200 µs, over links with a rate; with a background that gives way, and without."""
    figures: Figures = {}
    for rate in LINKS if not shaped_missing() else ():
        with shaped(rate) as line, ours.daemon(b.folder / "link", LINK_SETTINGS, line) as daemon:
            name = f"link of {rate / 1000:g} Gbit/s"
            told = daemon.move(b.content, b.memory, "--random", "--touches", FAULTS,
                               source=(*LINK_PLAIN, "--no-background"), whole=False)  # fmt: skip
            figures |= _waits(f"{name}, idle", told["guest"])
            for how, options in {"gives way": (), "insists": ("--insist",)}.items():
                told = daemon.move(b.content, b.memory, "--random", "--think-ns", LINK_THINK_NS,
                                   source=(*LINK_PLAIN, *options))  # fmt: skip
                figures |= _waits(f"{name}, {how}", told["guest"])
                figures[f"{name}, {how}: total"] = told["source"]["duration_us"]
    return figures


def lanes(b: Bench) -> Figures:
    """The background alone, beside plain streams."""
    figures: Figures = {}
    for count in LANES:
        figures |= _lanes(b, count, b.content)
    return figures


def tls(b: Bench) -> Figures:
    """The background and faults with TLS, each beside the same in plain text."""
    figures: Figures = {}
    identity = Authority(b.folder).issue("bench", "IP:127.0.0.1")
    files = dict(zip(("certificate", "key", "ca"), map(str, identity), strict=True))
    settings = "[tls]\n" + "".join(f'{name} = "{path}"\n' for name, path in files.items()) + 'peers = ["*"]\n'
    shown = tuple(f"--{name}={path}" for name, path in files.items())
    with ours.daemon(b.folder / "tls", settings) as guarded:
        for name, daemon, source in ("plain", b.daemon, ()), ("TLS", guarded, shown):
            told = daemon.move(b.content, b.memory, "--touches", 1, source=("--lanes", 2, *source))
            told["destination_cpu_s"] = told["daemon_cpu_s"]
            figures |= _throughput(f"{name}, 2 lanes", b.memory, told["daemon"]["running_s"], told)
            quiet = ("--no-background", *source)
            told = daemon.move(b.content, b.memory, "--random", "--touches", FAULTS, source=quiet, whole=False)
            figures |= _waits(f"{name}, idle, 1 thread", told["guest"])
    return figures


def cost(b: Bench) -> Figures:
    """What filling a memory file takes by itself, and what our ways to populate take beside it."""
    figures: Figures = {}
    for backing, huge in BACKINGS.items():
        if huge and not free_huge_pages(COST_MEMORY // huge):
            continue
        told = run("cost", "--memory", COST_MEMORY, "--source", b.content, "--backing", backing)
        figures |= {f"{backing}: {name}": told[name] * GIB / COST_MEMORY for name in told if name.endswith("_us")}
        for way in Populate:
            figures[f"{backing}: {way.value}_us"] = populate_us(way, huge) * GIB / COST_MEMORY
    return figures


def populate_us(way: Populate, huge_page: int, memory: int = COST_MEMORY) -> float:
    """CPU time to fill a new memfd with `memory` bytes from a socket."""
    fd = check(lib.gm_memfile_memfd, b"bench", memory, huge_page)
    try:
        return check(lib.gm_measure_populate, fd, native_populate(way), memory) / 1e3
    finally:
        os.close(fd)


def free_huge_pages(wanted: int) -> bool:
    return int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text()) >= wanted


MEASURES: dict[str, Callable[[Bench], Figures]] = {
    "floor": floor,
    "idle": idle,
    "busy": busy,
    "qemu": peer,
    "thinking": thinking,
    "lanes": lanes,
    "folios": large_folios,
    "stages": stages,
    "ahead": ahead,
    "link": link,
    "growth": growth,
    "tls": tls,
    "cost": cost,
}


# What --quick does without.
SLOW = {"thinking", "stages", "ahead", "link", "growth", "cost"}


def _guests(b: Bench, pattern: str, think_ns: int = 0) -> dict[str, tuple[object, ...]]:
    """Who touches all memory, and what to tell it: a thread, and a vCPU if there can be one."""
    guests: dict[str, tuple[object, ...]] = {"": (*PATTERNS[pattern], "--think-ns", think_ns)}
    if not kvm_missing():
        guests[VCPU] = "--vcpu", image("binary", b.memory // PAGE, random=pattern == "random", think_ns=think_ns)
    return guests


def _lanes(b: Bench, count: int, content: Path, kind: str = "", *backing: object) -> Figures:
    """So many lanes that carry `content` to memory of one kind, beside as many plain streams."""
    warm(b.memory)
    plain = run("stream", "--memory", b.memory, "--source", content, "--threads", count, *backing)
    told = b.daemon.move(content, b.memory, "--touches", 1, *backing, source=("--lanes", count))
    told["destination_cpu_s"] = told["daemon_cpu_s"]
    return _throughput(f"stream of {count}{kind}", b.memory, plain["duration_us"] / 1e6, plain) | _throughput(
        f"{count} lanes{kind}", b.memory, told["daemon"]["running_s"], told
    )


def _whole(name: str, told: Result) -> Figures:
    """Of a whole migration: waits by the guest's clock, and by the daemon's as QEMU measures them."""
    total, threads = told["source"]["duration_us"], told["daemon"]["threads"]
    count, blocked = (sum(thread[key] for thread in threads) for key in ("waits", "blocked_us"))
    return _waits(name, told["guest"]) | {
        f"{name}: share blocked": told["guest"]["wait_us"]["sum"] / total,
        f"{name}: total": total,
        f"{name}, read to continued: count": count,
        f"{name}, read to continued: mean": blocked / count if count else 0.0,
        f"{name}, read to continued: share blocked": blocked / total,
    }


def _of_qemu(name: str, told: Result) -> Figures:
    """What QEMU says, and its guest."""
    waits = told["guest_waits_us"]
    return {
        f"{name}: mean": told["wait_us"],
        f"{name}: count": told["requests"],
        f"{name}: total": told["total_us"],
        f"{name}: share blocked": told["blocked_share"],
        f"{name}, guest's clock: count": len(waits),
        f"{name}, guest's clock: p50": median(waits) if waits else 0.0,
        f"{name}, guest's clock: mean": mean(waits) if waits else 0.0,
        f"{name}, guest's clock: share blocked": sum(waits) / told["total_us"],
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
