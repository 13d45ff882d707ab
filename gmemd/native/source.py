"""The source's native side: what is still to be sent, the urgent lane, and the background lanes."""

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any

from gmemd.native._errors import check, checked
from gmemd.native._native import ffi, lib
from gmemd.native.memory import RUNS_AT_ONCE, Memory, Region
from gmemd.native.tls import Tls, native_of

ASKED_RECORDS = 1 << 14  # between two looks of the event loop: 400 KiB


class Order:
    """The order in which a guest is expected to need the pages of this memory, from the faults of traces."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.native: Any = ffi.gc(checked(lib.gm_order_new, memory.native), lib.gm_order_free)

    def add(self, records: bytes, regions: Sequence[Region]) -> None:
        """Puts the pages of `struct gm_trace_record`s behind those that it has. `regions` are the trace's."""
        places = ffi.new("struct gm_order_region[]", [(region.gpa, region.page_shift) for region in regions])
        with ffi.from_buffer("struct gm_trace_record[]", records) as faults:
            check(lib.gm_order_add, self.native, faults, len(faults), places)

    def counters(self) -> dict[str, int]:
        """Of what it has, and of what it could not take, by name."""
        out = ffi.new("struct gm_order_counters *")
        lib.gm_order_counters(self.native, out)
        return {name: getattr(out, name) for name, _ in ffi.typeof("struct gm_order_counters").fields}


class Source:
    """One migration at its source."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.native: Any = ffi.gc(checked(lib.gm_source_new, memory.native), lib.gm_source_free)
        self._order: Order | None = None  # which the native side reads
        self._asked: Any = None
        self._records: Any = None

    def follow(self, order: Order) -> None:
        """The background sends these pages first."""
        lib.gm_source_follow(self.native, order.native)
        self._order = order

    def open(self) -> None:
        """What the memory holds is final: requests are answered from now on."""
        lib.gm_source_open(self.native)

    def learn(self) -> None:
        """From now on, what is asked for is written down. Before any lane is made."""
        self._asked = checked(lib.gm_source_learn, self.native, ASKED_RECORDS)
        self._records = ffi.new("struct gm_trace_record[]", ASKED_RECORDS)

    def asked(self) -> bytes:
        """The pages that were asked for since the last call, as `struct gm_trace_record`s."""
        found = lib.gm_trace_read(self._asked, self._records, ASKED_RECORDS)
        return bytes(ffi.buffer(self._records, found * ffi.sizeof("struct gm_trace_record"))) if found else b""

    def restart(self) -> None:
        """Begins anew: every page is to be sent."""
        lib.gm_source_restart(self.native)

    def skip(self, region: int, first: int, pages: int) -> None:
        """These need not be sent."""
        lib.gm_source_skip(self.native, region, first, pages)

    def holes(self, region: int) -> Iterator[list[tuple[int, int]]]:
        """Runs (first page, pages) that the file has no data for, some thousands at a time; they will not be sent."""
        pairs = ffi.new("uint64_t[]", 2 * RUNS_AT_ONCE)
        at = ffi.new("uint64_t *")
        found = RUNS_AT_ONCE
        while found == RUNS_AT_ONCE:
            found = lib.gm_source_holes(self.native, region, at, pairs, RUNS_AT_ONCE)
            if found:
                yield [(pairs[2 * i], pairs[2 * i + 1]) for i in range(found)]

    def set_rate(self, bytes_per_s: int) -> None:
        """The background sends at most so much, 0 as much as it can; faults are never held back."""
        lib.gm_source_set_rate(self.native, bytes_per_s)

    def set_giveway(self, giveway: bool) -> None:
        """Whether the background slows down when pages are waited for long; it does unless told not to."""
        lib.gm_source_set_giveway(self.native, giveway)

    @property
    def lane_rate(self) -> int:
        """Bytes a second that a background lane may send now to give way, 0 for no limit."""
        return int(lib.gm_source_lane_rate(self.native))

    @property
    def pause(self) -> float:
        """Seconds that the background has to wait now."""
        return int(lib.gm_source_pause_us(self.native)) / 1e6

    def counters(self) -> dict[str, int]:
        """Counts since the beginning, by name."""
        out = ffi.new("struct gm_source_counters *")
        lib.gm_source_counters(self.native, out)
        return {name: getattr(out, name) for name, _ in ffi.typeof("struct gm_source_counters").fields}

    def close(self) -> None:
        ffi.release(self.native)


class PushState(Enum):
    """Why a push returned: the socket is full, the budget is used up, the rate allows no more now, or all is sent."""

    FULL = lib.GM_PUSH_FULL
    BUSY = lib.GM_PUSH_BUSY
    EARLY = lib.GM_PUSH_EARLY
    DONE = lib.GM_PUSH_DONE


class Push:
    """A background lane. `lane` is 1 or more; `socket` is a non-blocking descriptor, the caller's, with the session
    `tls` on it."""

    def __init__(self, source: Source, lane: int, socket: int, *, checksum: bool, tls: Tls | None = None) -> None:
        self.source = source
        self._tls = tls
        self.native: Any = ffi.gc(
            checked(lib.gm_push_new, source.native, lane, socket, native_of(tls), checksum), lib.gm_push_free
        )

    def run(self, budget_us: int) -> PushState:
        """Sends what nobody has asked for yet."""
        return PushState(check(lib.gm_push_run, self.native, budget_us))

    def beat(self) -> PushState:
        """Sends a sign of life, for a lane that has nothing else to say."""
        return PushState(check(lib.gm_push_beat, self.native))

    def hear(self) -> bool:
        """Takes what the destination says here, which is that it is alive; returns whether it said anything."""
        return check(lib.gm_push_hear, self.native) > 0

    def close(self) -> None:
        ffi.release(self.native)


class Server:
    """The urgent lane: answers requests. `socket` is a non-blocking descriptor, the caller's, with the session `tls`
    on it."""

    def __init__(
        self,
        source: Source,
        socket: int,
        *,
        checksum: bool,
        poll_us: int,
        ahead: int = 0,
        tls: Tls | None = None,
    ) -> None:
        self.source = source
        self._tls = tls
        self.native: Any = ffi.gc(
            checked(lib.gm_server_new, source.native, socket, native_of(tls), checksum, poll_us, ahead),
            lib.gm_server_free,
        )

    def run(self) -> None:
        """Answers until `stop` or until the lane ends; call it in a thread of its own."""
        check(lib.gm_server_run, self.native)

    def stop(self) -> None:
        lib.gm_server_stop(self.native)

    def beat(self) -> None:
        lib.gm_server_beat(self.native)

    @property
    def heard_ns(self) -> int:
        """When a request or beat last came, CLOCK_MONOTONIC."""
        return int(lib.gm_server_heard_ns(self.native))

    def close(self) -> None:
        ffi.release(self.native)
