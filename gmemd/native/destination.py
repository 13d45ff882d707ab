"""The destination's native side: the migration that faults belong to, its receiving lanes, and the pager."""

from dataclasses import dataclass
from typing import Any

from gmemd.errors import GmemdError
from gmemd.native._errors import check, checked, exception, problem
from gmemd.native._native import ffi, lib
from gmemd.native.memory import Memory
from gmemd.native.tls import Tls, native_of

TRACE_RECORDS = 1 << 14  # faults between two looks of the event loop: 400 KiB, half a second at 30 000 a second
BOUNDS_NS = [lib.gm_histogram_bound(i) for i in range(lib.GM_BUCKETS)]  # lower bounds of a histogram's buckets
PERCENTILES = {"p50": 500_000, "p90": 900_000, "p99": 990_000, "p999": 999_000}  # parts per million


@dataclass(frozen=True, slots=True)
class Events:
    """What happened since the last look. `problem` is the latest."""

    complete: bool
    urgent_down: bool
    stuck: bool
    vmm_gone: bool
    vmm_broken: bool
    problem: GmemdError


@dataclass(frozen=True, slots=True)
class Wait:
    """A thread that waits for a page, since a time of CLOCK_MONOTONIC in ns; thread 0 is one that the VMM does not
    tell."""

    region: int
    page: int
    thread: int
    since_ns: int
    vcpu: bool = False


@dataclass(frozen=True, slots=True)
class Blocked:
    """How long a thread has waited for pages, over all of its waits that have ended. `thread` as in a Wait."""

    thread: int
    vcpu: bool
    waits: int
    blocked_ns: int
    longest_ns: int


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many values fell between each two of BOUNDS_NS, and what all values add up to."""

    counts: list[int]
    sum_ns: int


class Destination:
    """One migration at its destination."""

    def __init__(self, memory: Memory, *, trace: bool = False) -> None:
        self.memory = memory
        self.native: Any = ffi.gc(
            checked(lib.gm_destination_new, memory.native, TRACE_RECORDS if trace else 0), lib.gm_destination_free
        )
        self.event_fd: int = lib.gm_destination_event_fd(self.native)
        self._trace = lib.gm_destination_trace(self.native)
        self._records = ffi.new("struct gm_trace_record[]", TRACE_RECORDS) if trace else None

    def events(self) -> Events:
        """Takes what happened. `event_fd` is readable when there is something."""
        found = problem()
        bits = lib.gm_destination_events(self.native, found)
        return Events(
            complete=bool(bits & lib.GM_EVENT_COMPLETE),
            urgent_down=bool(bits & lib.GM_EVENT_URGENT_DOWN),
            stuck=bool(bits & lib.GM_EVENT_STUCK),
            vmm_gone=bool(bits & lib.GM_EVENT_VMM_GONE),
            vmm_broken=bool(bits & lib.GM_EVENT_VMM_BROKEN),
            problem=exception(found),
        )

    def set_vcpus(self, socket: int, vcpus: int) -> None:
        """vCPUs that leave KVM_RUN for a page ask on this socket, and are answered on it. Before a pager has this."""
        lib.gm_destination_set_vcpus(self.native, socket, vcpus)

    def ask_vcpus(self) -> None:
        """Has vCPUs that a predecessor may have heard ask again."""
        lib.gm_destination_ask_vcpus(self.native)

    def told_zero(self, region: int, first: int, pages: int) -> int:
        """Receives pages that are zero at the source, as holes. Returns how many of them were missing."""
        return check(lib.gm_destination_told_zero, self.native, region, first, pages)

    def discard(self, region: int, first: int, pages: int) -> None:
        """The VMM took these pages out: they are zero from then on."""
        check(lib.gm_destination_discard, self.native, region, first, pages)

    def counters(self) -> dict[str, int]:
        """Counts since the beginning, by name."""
        out = ffi.new("struct gm_counters *")
        lib.gm_destination_counters(self.native, out)
        return {name: getattr(out, name) for name, _ in ffi.typeof("struct gm_counters").fields}

    def latency_us(self) -> dict[str, float]:
        """How long faults waited, from the message read to the page mapped: percentiles, max and mean in µs."""
        histogram = lib.gm_destination_latency(self.native)
        out = ffi.new("uint64_t[]", len(PERCENTILES))
        lib.gm_histogram_percentiles(histogram, list(PERCENTILES.values()), out, len(PERCENTILES))
        count = lib.gm_histogram_count(histogram)
        values = {name: out[i] / 1000 for i, name in enumerate(PERCENTILES)}
        values["max"] = lib.gm_histogram_max_ns(histogram) / 1000
        values["mean"] = lib.gm_histogram_sum_ns(histogram) / 1000 / count if count else 0.0
        return values

    def waits(self) -> list[Wait]:
        """Who waits now, longest first."""
        out = ffi.new("struct gm_wait[]", lib.GM_MAX_WAITS)
        found = lib.gm_destination_waits(self.native, out, lib.GM_MAX_WAITS)
        waits = [Wait(w.region, w.page, w.thread, w.since_ns, bool(w.vcpu)) for w in out[0:found]]
        return sorted(waits, key=lambda wait: wait.since_ns)

    def blocked(self) -> list[Blocked]:
        """The threads that have waited, by how long, longest first."""
        out = ffi.new("struct gm_blocked_thread[]", lib.GM_MAX_THREADS)
        found = lib.gm_destination_blocked(self.native, out, lib.GM_MAX_THREADS)
        threads = [Blocked(t.thread, bool(t.vcpu), t.waits, t.blocked_ns, t.longest_ns) for t in out[0:found]]
        return sorted(threads, key=lambda thread: thread.blocked_ns, reverse=True)

    def histograms(self) -> dict[str, Histogram]:
        """How long faults took by stage: the whole, and from the page's coming to it being mapped."""
        whole = lib.gm_destination_latency(self.native)
        install = lib.gm_destination_installing(self.native)
        return {"whole": _histogram(whole), "install": _histogram(install)}

    def trace(self) -> tuple[bytes, int]:
        """Faults since the last call as `struct gm_trace_record`s, and how many found no room."""
        found = lib.gm_trace_read(self._trace, self._records, TRACE_RECORDS)
        size = found * ffi.sizeof("struct gm_trace_record")
        return bytes(ffi.buffer(self._records, size)) if found else b"", lib.gm_trace_lost(self._trace)

    def close(self) -> None:
        """Frees it. No pager and no lane may use it any more."""
        ffi.release(self.native)


def _histogram(native: Any) -> Histogram:
    counts = ffi.new("uint64_t[]", lib.GM_BUCKETS)
    lib.gm_histogram_counts(native, counts)
    return Histogram(list(counts), lib.gm_histogram_sum_ns(native))


class Lane:
    """The receiving end of a page lane. Lane 0 is the urgent one; `socket` is a non-blocking descriptor, the
    caller's, with the session `tls` on it."""

    def __init__(
        self, destination: Destination, lane: int, socket: int, *, checksum: bool, tls: Tls | None = None
    ) -> None:
        self.destination = destination
        self._tls = tls
        self.native: Any = ffi.gc(
            checked(lib.gm_lane_new, destination.native, lane, socket, native_of(tls), checksum), lib.gm_lane_free
        )

    def receive(self, budget_us: int) -> bool:
        """Installs what comes. Returns True when the budget is used up, False when the socket is empty."""
        return check(lib.gm_lane_receive, self.native, budget_us) == lib.GM_LANE_BUSY

    def beat(self) -> None:
        """Tells the source on a background lane that we are alive."""
        lib.gm_lane_beat(self.native)

    @property
    def held(self) -> bool:
        """Whether it ended at a frame that the host has no room for, and that it will try again."""
        return bool(lib.gm_lane_held(self.native))

    @property
    def heard_ns(self) -> int:
        """When something last came, CLOCK_MONOTONIC."""
        return int(lib.gm_lane_heard_ns(self.native))

    def close(self) -> None:
        ffi.release(self.native)


class Pager:
    """The thread that answers faults, for all migrations. Polls at most `poll_us` before it sleeps."""

    def __init__(self, poll_us: int) -> None:
        self.native: Any = ffi.gc(checked(lib.gm_pager_new, poll_us), lib.gm_pager_free)
        self._kept: dict[Destination, Lane | None] = {}  # what the thread works on must not be freed meanwhile

    def run(self) -> None:
        """Runs until `stop`; call it in a thread of its own."""
        check(lib.gm_pager_run, self.native)

    def stop(self) -> None:
        lib.gm_pager_stop(self.native)

    @property
    def turns(self) -> int:
        """How often it has looked for work and done all that it found."""
        return int(lib.gm_pager_turns(self.native))

    def turn(self) -> None:
        """Has it do so once more, without waiting for it."""
        lib.gm_pager_turn(self.native)

    def add(self, destination: Destination) -> None:
        """From now on the pager reads the destination's faults."""
        check(lib.gm_pager_add, self.native, destination.native)
        self._kept[destination] = None

    def remove(self, destination: Destination) -> None:
        """From now on it does not. The destination's urgent lane is taken away, too."""
        lib.gm_pager_remove(self.native, destination.native)
        self._kept.pop(destination, None)

    def set_urgent(self, destination: Destination, lane: Lane | None) -> None:
        """Gives the destination its urgent lane, and asks on it for all that is waited for."""
        check(lib.gm_pager_urgent, self.native, destination.native, lane.native if lane else ffi.NULL)
        self._kept[destination] = lane

    def beat(self, destination: Destination) -> None:
        """Tells the source on the urgent lane that we are alive."""
        lib.gm_pager_beat(self.native, destination.native)

    def ask(self, destination: Destination) -> None:
        """Asks once more for all that is waited for."""
        lib.gm_pager_ask(self.native, destination.native)

    def close(self) -> None:
        ffi.release(self.native)
