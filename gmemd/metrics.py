"""What the daemon tells Prometheus. Names and labels are documented in docs/operate.md."""

import math
import time
from collections.abc import Callable, Iterable, Mapping

from gmemd import __version__
from gmemd.exposition import SCHEMA, Distribution, Family
from gmemd.migrate.destination import IncomingMigration, Phase
from gmemd.native.destination import BOUNDS_NS, Histogram
from gmemd.registry import Registry

# Classic buckets end at powers of two of a nanosecond, 8 µs to 17 s: there the native histogram has bounds, too.
CLASSIC_NS = [1 << octave for octave in range(13, 35)]
CLASSIC_AT = [BOUNDS_NS.index(bound) for bound in CLASSIC_NS]
Counters = Mapping[str, int]
# Counters of a migration: metric, help, and for each a label with the counters that it is made of.
COUNTERS: list[tuple[str, str, str, dict[str, str]]] = [
    (
        "gmemd_faults_total",
        "Faults of the guest, by how the kernel or the VMM reported them.",
        "kind",
        {"missing": "faults_missing", "minor": "faults_minor", "vcpu": "faults_vcpu"},
    ),
    ("gmemd_faults_again_total", "Faults on pages that were in place.", "", {"": "faults_again"}),
    ("gmemd_requests_total", "Requests for pages to the source.", "", {"": "requests"}),
    (
        "gmemd_installed_pages_total",
        "Pages put in place, by how they came.",
        "way",
        {"urgent": "urgent_pages", "background": "background_pages", "zero": "zero_pages"},
    ),
    ("gmemd_dropped_pages_total", "Pages that came when they were there already.", "", {"": "dropped_pages"}),
    ("gmemd_removed_pages_total", "Pages that the VMM took out.", "", {"": "removed_pages"}),
    ("gmemd_damaged_frames_total", "Frames whose checksum was wrong.", "", {"": "damaged_frames"}),
    (
        "gmemd_received_bytes_total",
        "Content of pages that came.",
        "lane",
        {"urgent": "urgent_bytes", "background": "background_bytes"},
    ),
]
GAUGES: list[tuple[str, str, Callable[[IncomingMigration, Counters], float]]] = [
    ("gmemd_memory_bytes", "Guest memory.", lambda m, _: m.memory.size),
    ("gmemd_pages", "Pages of guest memory.", lambda m, _: m.memory.pages),
    ("gmemd_missing_pages", "Pages that are not in place yet.", lambda m, _: m.memory.pages - m.memory.received),
    ("gmemd_waits", "Threads of the guest that wait for a page now.", lambda _, counters: counters["waits"]),
    ("gmemd_longest_wait_seconds", "How long the one that waits longest has waited.", lambda m, _: _longest_wait(m)),
    ("gmemd_lanes", "Connections for pages that are there.", lambda m, _: len(m.session.lanes) if m.session else 0),
    ("gmemd_stuck", "1 while pages cannot be put in place.", lambda m, _: float(m.report.stuck is not None)),
]


def collect(registry: Registry, pager_turns: int) -> list[Family]:
    """All of it, as of now."""
    migrations = list(registry)
    counted = [(m, {"migration": m.name}, m.destination.counters()) for m in migrations]
    return [
        Family("gmemd_build_info", "gauge", "1, with the version.", [({"version": __version__}, 1.0)]),
        Family("gmemd_pager_turns_total", "counter", "Turns of the thread that answers faults.", [({}, pager_turns)]),
        Family("gmemd_migrations", "gauge", "Migrations that are here, by phase.", _phases(migrations)),
        Family("gmemd_unusable", "gauge", "Guests that cannot be taken over.", [({}, len(registry.unusable))]),
        Family(
            "gmemd_migrations_ended_total",
            "counter",
            "Migrations that have ended.",
            [({"phase": phase.value}, registry.ended[phase.value]) for phase in (Phase.COMPLETE, Phase.ABANDONED)],
        ),
        *(
            Family(name, "gauge", text, [(labels, value(m, counters)) for m, labels, counters in counted])
            for name, text, value in GAUGES
        ),
        *(
            Family(
                name,
                "counter",
                text,
                [
                    (labels | ({label: kind} if label else {}), counters[counter])
                    for _, labels, counters in counted
                    for kind, counter in kinds.items()
                ],
            )
            for name, text, label, kinds in COUNTERS
        ),
        Family(
            "gmemd_recoveries_total",
            "counter",
            "Connections of a source after the first.",
            [(labels, m.recoveries) for m, labels, _ in counted],
        ),
        Family(
            "gmemd_blocked_seconds_total",
            "counter",
            "How long threads of the guest have waited for pages, all together.",
            [(labels, sum(t.blocked_ns for t in m.destination.blocked()) / 1e9) for m, labels, _ in counted],
        ),
        Family(
            "gmemd_fault_duration_seconds",
            "histogram",
            "From the fault's message to the page being mapped (whole); from the page's coming to that (install).",
            [
                (labels | {"stage": stage}, distribution(histogram))
                for m, labels, _ in counted
                for stage, histogram in m.destination.histograms().items()
            ],
        ),
    ]


def _phases(migrations: Iterable[IncomingMigration]) -> list[tuple[Mapping[str, str], float | Distribution]]:
    phases = [m.phase for m in migrations]
    return [({"phase": phase.value}, phases.count(phase)) for phase in Phase]


def _longest_wait(migration: IncomingMigration) -> float:
    waits = migration.destination.waits()
    return max(time.monotonic_ns() - waits[0].since_ns, 0) / 1e9 if waits else 0.0


def distribution(histogram: Histogram) -> Distribution:
    """In seconds. A value counts for the native bucket in which the middle of its own lies: 3 % aside at most."""
    counts = histogram.counts
    exponential: dict[int, int] = {}
    for at, count in enumerate(counts):
        if count and at:
            number = _native_bucket(at)
            exponential[number] = exponential.get(number, 0) + count
    return Distribution(
        sum(counts),
        histogram.sum_ns / 1e9,
        counts[0],
        [(bound / 1e9, sum(counts[:at])) for bound, at in zip(CLASSIC_NS, CLASSIC_AT, strict=True)],
        exponential,
    )


def _native_bucket(at: int) -> int:
    """The n of the bucket that ends at 2^(n / 2^SCHEMA) seconds."""
    end = BOUNDS_NS[at + 1] if at + 1 < len(BOUNDS_NS) else BOUNDS_NS[at]
    return math.ceil(math.log2((BOUNDS_NS[at] + end) / 2e9) * (1 << SCHEMA))
