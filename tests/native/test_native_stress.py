"""Invariant 1 under load: the same pages on every lane at once, and a guest whose writes must all still be there."""

import random
import struct
import threading

import pytest
from native_frames import pages
from native_rig import PAGE, Guest, Line, RunningPager, Task, content

from gmemd.native.memory import Populate

PAGES, THREADS, LANES, ROUNDS = 256, 8, 4, 12
FRAME = 16
COUNTER = struct.Struct("<Q")

FRAMES = [
    pages(0, first, b"".join(content(page) for page in range(first, first + FRAME))) for first in range(0, PAGES, FRAME)
]


def run_guest(guest: Guest, own: list[int], seed: float, begin: threading.Barrier, end: threading.Event) -> None:
    """Touches its pages in some order, writes a number into each, and looks at them again and again until the end."""
    order, written = random.Random(seed), dict[int, bytes]()
    order.shuffle(own)
    begin.wait()
    for page in own:
        assert guest.read(page) == content(page), f"page {page} before it was written to"
        written[page] = COUNTER.pack(order.getrandbits(63))
        guest.write(page, written[page])
        check(guest, order.choice(list(written)), written)
    while not end.is_set():
        check(guest, order.choice(own), written)
    for page in own:
        check(guest, page, written)


def check(guest: Guest, page: int, written: dict[int, bytes]) -> None:
    expected = written[page] + content(page)[len(written[page]) :]
    assert guest.read(page) == expected, f"page {page} after it was written to"


def receive(line: Line, begin: threading.Barrier) -> None:
    begin.wait()
    line.deal()


@pytest.mark.parametrize("way", list(Populate))
def test_no_write_is_ever_undone(way: Populate, rng: random.Random) -> None:
    for _ in range(ROUNDS):
        with Guest((PAGES, PAGE), populate=way) as guest, RunningPager() as running, running.serving(guest) as far:
            lines = [guest.line(lane) for lane in range(1, LANES + 1)]
            for line in lines:  # so that all lanes have everything to deal with from the beginning
                line.far.send(b"".join(rng.sample(FRAMES, len(FRAMES))))
            begin, end = threading.Barrier(LANES + THREADS + 1), threading.Event()
            lanes = [Task(receive, line, begin) for line in lines]
            guests = [
                Task(run_guest, guest, list(range(i, PAGES, THREADS)), rng.random(), begin, end) for i in range(THREADS)
            ]
            begin.wait()
            urgent = Task(far.send, b"".join(FRAMES))
            for task in [*lanes, urgent]:
                task.result()
            end.set()
            for thread in guests:
                thread.result()
            assert guest.memory.received == PAGES
            assert guest.counter("dropped_pages") >= (LANES - 1) * PAGES
