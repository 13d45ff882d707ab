"""How long each thread was kept waiting: every thread for itself, and no moment twice."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
from native_frames import pages
from native_inside import ffi as inside_ffi
from native_inside import inside
from native_rig import FEATURE_THREAD_ID, Guest, Task, content, paged, until

from gmemd.native import lib

ROOM = 64 * (lib.GM_MAX_THREADS + 64)  # more than it takes, as Python does not know what is inside


class Ledger:
    """One of its own, which Python otherwise has only as a part of a destination."""

    def __init__(self) -> None:
        self._memory = inside_ffi.new("uint64_t[]", ROOM // 8)
        self.native: Any = inside_ffi.cast("struct gm_blocked *", self._memory)
        inside.gm_blocked_init(self.native)

    def add(self, thread: int, since: int, until: int, vcpu: int = 0) -> None:
        wait = inside_ffi.new("struct gm_wait *", {"thread": thread, "vcpu": vcpu, "since_ns": since})
        inside.gm_blocked_add(self.native, wait, until)

    def list(self) -> dict[tuple[int, int], tuple[int, int, int]]:
        """(waits, blocked, longest) by (thread, vcpu)."""
        out = inside_ffi.new("struct gm_blocked_thread[]", lib.GM_MAX_THREADS)
        found = inside.gm_blocked_list(self.native, out, lib.GM_MAX_THREADS)
        return {(t.thread, t.vcpu): (t.waits, t.blocked_ns, t.longest_ns) for t in out[0:found]}


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    ledger = Ledger()
    yield ledger
    inside.gm_blocked_deinit(ledger.native)


def test_each_thread_for_itself(ledger: Ledger) -> None:
    ledger.add(7, 100, 150)
    ledger.add(8, 100, 110)
    ledger.add(7, 200, 210)
    ledger.add(7, 300, 301, vcpu=1)  # vCPU 7 is not thread 7
    assert ledger.list() == {(7, 0): (2, 60, 50), (8, 0): (1, 10, 10), (7, 1): (1, 1, 1)}


def test_what_two_waits_of_a_thread_have_in_common_counts_once(ledger: Ledger) -> None:
    """A signal takes a thread out of its fault; the first message is answered all the same, and so is the second."""
    ledger.add(7, 100, 150)
    ledger.add(7, 120, 160)
    ledger.add(7, 110, 130)
    assert ledger.list() == {(7, 0): (3, 60, 50)}


def test_many_threads_and_more_than_there_is_room_for(ledger: Ledger, rng: random.Random) -> None:
    threads = rng.sample(range(1, 1 << 22), 2 * lib.GM_MAX_THREADS)
    for thread in threads:
        for _ in range(2):
            ledger.add(thread, 0, thread)
    told = ledger.list()
    others = told.pop((0, 0))
    assert len(told) >= lib.GM_MAX_THREADS // 2
    assert told == {(thread, 0): (2, thread, thread) for thread in threads[: len(told)]}
    assert others[0] == 2 * (len(threads) - len(told))


def test_real_threads() -> None:
    with Guest(features=FEATURE_THREAD_ID) as guest, paged(guest) as far:
        first, second = (Task(guest.read, page) for page in (3, 5))
        for _ in range(2):
            far.requested()
            assert guest.destination.blocked() == []
        far.send(pages(0, 3, content(3)) + pages(0, 5, content(5)))
        first.result()
        second.result()
        until(lambda: guest.counter("waits") == 0)
        told = guest.destination.blocked()
        assert {t.thread for t in told} == {first.native_id, second.native_id}
        assert [t.waits for t in told] == [1, 1]
        assert told[0].blocked_ns >= told[1].blocked_ns > 0
        assert max(t.longest_ns for t in told) / 1000 <= guest.destination.latency_us()["max"]
