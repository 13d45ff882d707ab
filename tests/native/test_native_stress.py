"""Invariant 1 under load: the same pages on every lane at once, and a guest whose writes must all still be there."""

import os
import random
import struct
import threading
from contextlib import ExitStack
from queue import SimpleQueue

import pytest
from native_asking import DATAGRAM, AskingGuest
from native_frames import pages
from native_rig import PAGE, PATIENCE, WAYS, Guest, Line, RunningPager, Task, Way, content

PAGES, THREADS, LANES, ROUNDS = 1024, 8, 4, 2
FRAME = 16
WORD = struct.Struct("<Q")

FRAMES = [
    pages(0, first, b"".join(content(page) for page in range(first, first + FRAME))) for first in range(0, PAGES, FRAME)
]


class Thread:
    """Of the VMM: waits in the kernel for what is missing. Owns the first word of some pages."""

    AT = 0

    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    def read(self, page: int) -> bytes:
        return self.guest.read(page)

    def write(self, page: int, word: bytes) -> None:
        self.guest.write(page, word)


class Vcpu:
    """Asks where its bit is set, and then reaches the page past the VMM's mapping, as KVM does. Owns the second word
    of some pages."""

    AT = 8

    def __init__(self, guest: AskingGuest, number: int, answers: SimpleQueue[int]) -> None:
        self.guest, self.number, self.answers = guest, number, answers

    def read(self, page: int) -> bytes:
        if page in self.guest.stops():
            self.guest.ask(self.number, page)
            assert self.answers.get(timeout=PATIENCE) == self.guest.gpa(page)
            assert page not in self.guest.stops()
        return self.guest.held(page)

    def write(self, page: int, word: bytes) -> None:
        os.pwrite(self.guest.files[0], word, page * PAGE + self.AT)


def hand_out(guest: AskingGuest, answers: list[SimpleQueue[int]]) -> None:
    """The VMM's thread that hears what vCPUs are told, until its socket is shut."""
    while data := guest.ends[0].recv(DATAGRAM.size):
        vcpu, _, gpa = DATAGRAM.unpack(data)
        answers[vcpu].put(gpa)


def run_guest(who: Thread | Vcpu, own: list[int], seed: float, begin: threading.Barrier, end: threading.Event) -> None:
    """Touches its pages in some order, writes a word into each at once, and looks at them, and at those of others,
    again and again until the end."""
    order, written = random.Random(seed), dict[int, bytes]()
    order.shuffle(own)
    begin.wait()
    for page in own:
        check(who, page, content(page)[:8])
        written[page] = WORD.pack(order.getrandbits(63))
        who.write(page, written[page])
        written_still(who, order.choice(list(written)), written)
        check(who, order.randrange(PAGES))
    while not end.is_set():
        written_still(who, order.choice(own), written)
    for page in own:
        written_still(who, page, written)


def check(who: Thread | Vcpu, page: int, word: bytes | None = None) -> None:
    seen = who.read(page)
    assert seen[16:] == content(page)[16:], f"page {page}"
    assert word in (None, seen[who.AT : who.AT + 8]), f"page {page}: word {who.AT // 8}"


def written_still(who: Thread | Vcpu, page: int, written: dict[int, bytes]) -> None:
    check(who, page, written[page])


def background(rng: random.Random) -> bytes:
    """All of memory, a half of it after the other, so that one is let go of while the other comes."""
    half = len(FRAMES) // 2
    return b"".join(rng.sample(FRAMES[:half], half) + rng.sample(FRAMES[half:], half))


def receive(line: Line, data: bytes, begin: threading.Barrier) -> None:
    begin.wait()
    line.feed(data)


@pytest.mark.parametrize("vcpus", [0, 2])
@pytest.mark.parametrize("way", WAYS)
def test_no_write_is_ever_undone(way: Way, vcpus: int, rng: random.Random) -> None:
    for _ in range(ROUNDS):
        with ExitStack() as stack:
            asking = AskingGuest((PAGES, PAGE), vcpus=vcpus, populate=way) if vcpus else None
            guest = stack.enter_context(asking or Guest((PAGES, PAGE), populate=way))
            answers = [SimpleQueue[int]() for _ in range(vcpus)]
            everybody: list[Thread | Vcpu] = [Thread(guest) for _ in range(THREADS)]
            if asking:
                everybody += [Vcpu(asking, number, answers[number]) for number in range(vcpus)]
            far = stack.enter_context(stack.enter_context(RunningPager()).serving(guest))
            lines = [guest.line(lane) for lane in range(1, LANES + 1)]
            begin, end = threading.Barrier(LANES + len(everybody) + 1), threading.Event()
            listener = Task(hand_out, asking, answers) if asking else None
            lanes = [Task(receive, line, background(rng), begin) for line in lines]
            guests = [
                Task(run_guest, who, own_pages(who, index), rng.random(), begin, end)
                for index, who in enumerate(everybody)
            ]
            begin.wait()
            urgent = Task(far.send, b"".join(FRAMES))
            for task in [*lanes, urgent]:
                task.result()
            end.set()
            for thread in guests:
                thread.result()
            if asking and listener:
                asking.ends[0].shutdown(2)
                listener.result()
            assert guest.memory.received == PAGES
            assert guest.counter("dropped_pages") >= (LANES - 1) * PAGES


def own_pages(who: Thread | Vcpu, index: int) -> list[int]:
    """Threads share all pages out among them; of vCPUs, each has its word in every second page."""
    return list(range(index, PAGES, THREADS)) if isinstance(who, Thread) else list(range(who.number, PAGES, 2))
