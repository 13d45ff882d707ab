"""Traces that nobody recorded: accesses in well-known patterns, decided by a seed."""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gmemd.native import lib
from gmemd.trace import RECORD

STRIDE = 16  # pages
ZIPF_EXPONENT = 1.0
PHASE_TOUCHES = 512
# A booting kernel: runs of pages one after another, at once, then something else to do.
BOOT_RUN = (4, 128)
BOOT_GAP = 0.1  # of the usual one, within a run
BOOT_PAUSE = 50  # of them, between two runs
FIRST_THREAD = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """What a trace shall be like. `gap_ns`: between two accesses of a thread, on average. `writes`: their share."""

    pages: int
    threads: int
    faults: int
    gap_ns: int
    writes: float
    seed: int


# The pages that a thread touches, and the gap before each as a factor of the usual one.
Stream = Iterator[tuple[int, float]]


def sequential(plan: Plan, thread: int, _rng: random.Random) -> Stream:
    """Each thread walks through its own part, again and again."""
    first, last = thread * plan.pages // plan.threads, (thread + 1) * plan.pages // plan.threads
    return ((page, 1.0) for page in itertools.cycle(range(first, max(last, first + 1))))


def scattered(plan: Plan, _thread: int, rng: random.Random) -> Stream:
    """Anywhere."""
    while True:
        yield rng.randrange(plan.pages), rng.expovariate(1)


def strided(plan: Plan, thread: int, _rng: random.Random) -> Stream:
    """Every 16th page, then the one after each of these, and so on. Each thread begins with another one."""
    while True:
        for column in range(STRIDE):
            for page in range((column + thread) % STRIDE, plan.pages, STRIDE):
                yield page, 1.0


def zipf(plan: Plan, _thread: int, rng: random.Random) -> Stream:
    """A few pages often, most of them seldom: the n-th in proportion to 1/n. All threads love the same ones."""
    order = list(range(plan.pages))
    random.Random(plan.seed).shuffle(order)
    weights = list(itertools.accumulate(1 / rank**ZIPF_EXPONENT for rank in range(1, plan.pages + 1)))
    while True:
        for page in rng.choices(order, cum_weights=weights, k=PHASE_TOUCHES):
            yield page, rng.expovariate(1)


def phased(plan: Plan, _thread: int, rng: random.Random) -> Stream:
    """Anywhere in an eighth of memory, which changes from time to time."""
    window = max(1, plan.pages // 8)
    while True:
        start = rng.randrange(plan.pages - window + 1)
        for _ in range(PHASE_TOUCHES):
            yield start + rng.randrange(window), rng.expovariate(1)


def boot(plan: Plan, thread: int, rng: random.Random) -> Stream:
    """Runs of neighbouring pages in quick succession, mostly low ones, with pauses; the other threads come later."""
    pause = BOOT_PAUSE * (10.0 if thread else 1.0)
    while True:
        length = rng.randint(*BOOT_RUN)
        start = int(plan.pages * rng.random() ** 2)
        for page in range(start, min(start + length, plan.pages)):
            yield page, BOOT_GAP if page > start else pause * rng.expovariate(1)
        pause = BOOT_PAUSE


PATTERNS: dict[str, Callable[[Plan, int, random.Random], Stream]] = {
    "sequential": sequential,
    "random": scattered,
    "strided": strided,
    "zipf": zipf,
    "phased": phased,
    "boot": boot,
}


def synthesise(pattern: str, plan: Plan) -> bytes:
    """The accesses as `struct gm_trace_record`s in the order of their times, which begin at 0."""
    records = []
    for thread in range(plan.threads):
        rng = random.Random(plan.seed * 1_000_003 + thread)
        share = (thread + 1) * plan.faults // plan.threads - thread * plan.faults // plan.threads
        now = 0.0
        for page, gap in itertools.islice(PATTERNS[pattern](plan, thread, rng), share):
            now += gap * plan.gap_ns
            flags = lib.GM_TRACE_WRITE if rng.random() < plan.writes else 0
            records.append((int(now), page, FIRST_THREAD + thread, 0, flags))
    return b"".join(RECORD.pack(*record) for record in sorted(records, key=lambda record: record[0]))
