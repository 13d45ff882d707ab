"""vCPUs that leave KVM_RUN for a page: asked for once, answered when it is there, never trusted."""

import errno
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from native_asking import DATAGRAM, EVERY_VCPU, AskingGuest, asked, sealed
from native_frames import pages, zeros
from native_rig import PAGE, PATIENCE, Far, Guest, RunningPager, Task, content, new_file, told, until
from support import seccomp

from gmemd.errors import GmemdError, HandoffError
from gmemd.native import lib
from gmemd.native.memory import Memory, Region

if TYPE_CHECKING:
    from native_races import Races

pytest_plugins = ["native_races"]

PAGES = 200  # not a multiple of 64
LONG_ENOUGH = 0.02  # seconds in which a busy pager does a thousand turns
FLOOD = 10_000_000  # tries, of which a socket takes some hundreds


def test_a_vcpu_is_answered_when_its_page_is_there() -> None:
    with AskingGuest((PAGES, PAGE)) as guest, asked(guest) as far:
        before = guest.stops()
        guest.ask(3, 131)
        assert far.requested() == (0, 131, 1)
        far.send(pages(0, 131, content(131)))
        assert guest.answer() == (3, 1, guest.gpa(131))
        assert before - guest.stops() == {131}
        assert guest.held(131) == content(131)
        assert (guest.counter("faults_vcpu"), guest.counter("waits")) == (1, 0)


def test_vcpus_on_one_page_ask_the_source_once() -> None:
    with AskingGuest((PAGES, PAGE), vcpus=8) as guest, asked(guest) as far:
        for vcpu in range(8):
            guest.ask(vcpu, 7)
        until(lambda: guest.counter("waits") == 8)
        guest.ask(0, 8)
        assert [far.requested(), far.requested()] == [(0, 7, 1), (0, 8, 1)]
        far.send(pages(0, 7, content(7)))
        assert {guest.answer() for _ in range(8)} == {(vcpu, 1, guest.gpa(7)) for vcpu in range(8)}


def test_what_came_in_the_background_is_not_asked_for() -> None:
    """Its bits are clear, so that no vCPU stops there; one that had just stopped is told of the whole run."""
    with AskingGuest((PAGES, PAGE)) as guest, asked(guest) as far:
        data = b"".join(content(page) for page in range(20, 60))
        guest.line().feed(pages(0, 20, data), zeros(0, 60, 4))
        assert guest.stops() == set(range(PAGES // 64 * 64 + 64)) - set(range(20, 64))
        guest.ask(1, 30)
        assert guest.answer() == (1, 34, guest.gpa(30))
        guest.ask(1, 190)
        assert far.requested() == (0, 190, 1), "nothing was asked for before"


def test_a_vcpu_does_not_pass_before_its_page_is_received(races: "Races") -> None:
    """It might write to it, and a successor take the page for missing."""
    with AskingGuest((1 << 18, PAGE)) as guest:
        assert races.marking(guest.destination) == 0
        assert guest.memory.received == 1 << 18


def test_a_vcpu_that_asks_just_when_its_page_comes(races: "Races") -> None:
    """The pager finds the page received, or the lane finds the vCPU."""
    with AskingGuest((PAGES, PAGE)) as guest:
        guest.ask(3, 0)
        assert races.asking(guest.destination, content(0)) == 0
        assert guest.answer() == (3, 1, guest.gpa(0))


def test_bytes_count_once_though_a_frame_is_claimed_piece_by_piece() -> None:
    """As it is while a guest waits."""
    with AskingGuest((PAGES, PAGE)) as guest, asked(guest) as far:
        guest.ask(3, 131)
        assert far.requested() == (0, 131, 1)
        guest.line().feed(pages(0, 0, b"".join(content(page) for page in range(64))))
        assert (guest.counter("background_pages"), guest.counter("background_bytes")) == (64, 64 * PAGE)


def test_bitmaps_of_several_regions_lie_side_by_side() -> None:
    with AskingGuest((70, PAGE), (64, PAGE), (3, PAGE)) as guest, asked(guest):
        guest.line().feed(pages(1, 0, b"".join(content(page, 1) for page in range(64))))
        assert [len(guest.stops(region)) for region in range(3)] == [128, 0, 64]
        guest.ask(0, 63, 1)
        assert guest.answer() == (0, 1, guest.gpa(63, 1))


def answer_all(far: Far) -> None:
    """The source of an urgent lane, until it is closed. Its version of a page is one of its own."""
    while True:
        try:
            region, first, _ = far.requested()
            far.send(pages(region, first, content(first, region, version=1)))
        except (OSError, AssertionError):
            return


def ask_each(guest: AskingGuest, order: list[int]) -> dict[int, bytes]:
    """One vCPU: asks where a bit is set, and looks at the page, as KVM does past the mapping."""
    seen = {}
    for page in order:
        if page in guest.stops():
            guest.ask(0, page)
            vcpu, count, gpa = guest.answer()
            assert (vcpu, gpa) == (0, guest.gpa(page))
            assert count >= 1
            assert page not in guest.stops()
        seen[page] = guest.held(page)
    return seen


def test_both_ways_at_once_install_once(rng: random.Random) -> None:
    """The VMM's own threads wait in the userfaultfd, a vCPU asks, and everything comes in the background as well: of
    every page there is one version, and everybody has seen that one."""
    with AskingGuest((PAGES, PAGE)) as guest:
        with asked(guest) as far:
            source = Task(answer_all, far)
            orders = [rng.sample(range(PAGES), PAGES) for _ in range(4)]
            vcpu = Task(ask_each, guest, orders[0])
            threads = [Task(lambda order=order: {page: guest.read(page) for page in order}) for order in orders[1:]]
            background = guest.line()
            for first in range(0, PAGES, 8):
                background.feed(pages(0, first, b"".join(content(page) for page in range(first, first + 8))))
            seen = [task.result() for task in (vcpu, *threads)]
            far.socket.shutdown(socket.SHUT_RDWR)
            source.result()
        assert all(one == seen[0] for one in seen)
        for page, data in seen[0].items():
            assert data in (content(page), content(page, version=1))
            assert guest.held(page) == data
        counters = guest.destination.counters()
        assert counters["urgent_pages"] + counters["background_pages"] + counters["zero_pages"] == PAGES
        assert counters["dropped_pages"] > 0
        assert guest.memory.received == PAGES
        assert guest.stops() == set(range(PAGES, 256))


@contextmanager
def with_a_neighbour() -> Iterator[tuple[AskingGuest, Far, Guest, Far]]:
    """A guest that asks, and a small one beside it, each with its source."""
    with (
        AskingGuest((PAGES, PAGE)) as guest,
        Guest((8, PAGE)) as other,
        RunningPager() as running,
        running.serving(guest) as far,
        running.serving(other) as others,
    ):
        yield guest, far, other, others


@pytest.mark.parametrize(
    ("datagram", "message"),
    [
        (b"", "closed by the VMM"),
        (bytes(15), "15 bytes"),
        (bytes(17), "17 bytes"),
        (DATAGRAM.pack(0, 1, 0), "the second word 0"),
        (DATAGRAM.pack(4, 0, 0), "vCPU 4 of 4"),
        (DATAGRAM.pack(EVERY_VCPU, 0, 0), "vCPU 4294967295 of 4"),
        (DATAGRAM.pack(0, 0, PAGES * PAGE), "0xc8000 lies in no region"),
        (DATAGRAM.pack(0, 0, 2**64 - 1), "0xffffffffffffffff lies in no region"),
    ],
)
def test_a_vmm_that_breaks_the_protocol_is_alone_with_it(datagram: bytes, message: str) -> None:
    """Nobody listens to it any more; its own pages, and other guests, come all the same."""
    with with_a_neighbour() as (guest, far, other, others):
        if datagram:
            guest.ends[0].send(datagram)
        else:
            guest.ends[0].close()
        problem = told(guest.destination, "vmm_broken")
        assert isinstance(problem, HandoffError)
        assert message in str(problem)
        for each, its in ((guest, far), (other, others)):
            reader = Task(each.read, 3)
            assert its.requested() == (0, 3, 1)
            its.send(pages(0, 3, content(3)))
            assert reader.result() == content(3)
        assert guest.received() == {3}
        assert guest.stops() == set(range(256)) - {3}


def flood(guest: AskingGuest) -> GmemdError:
    """Asks without reading, until that is told, and the socket is full of requests that nobody takes."""
    guest.ends[0].setblocking(False)
    for sent in range(FLOOD):
        try:
            guest.ask(sent % 4, 5)
        except BlockingIOError:
            events = guest.destination.events()
            if events.stuck:
                return events.problem
    raise AssertionError("all requests were taken")


def test_a_vmm_that_reads_no_answers_is_not_listened_to_until_it_does() -> None:
    with with_a_neighbour() as (guest, far, other, others):
        guest.line().feed(pages(0, 5, content(5)))
        assert "does not read" in str(flood(guest))
        taken = []
        for page in (3, 4):  # the turn in which it was told ends before the first of them
            reader = Task(other.read, page)
            assert others.requested() == (0, page, 1)
            others.send(pages(0, page, content(page)))
            assert reader.result() == content(page)
            taken.append(guest.counter("faults_vcpu"))
        assert taken[0] == taken[1]

        guest.ends[0].settimeout(PATIENCE)
        while guest.answer()[0] != EVERY_VCPU:
            pass
        guest.ask(2, 6)
        answers = Task(lambda: next(answer for answer in iter(guest.answer, None) if answer[2] != guest.gpa(5)))
        assert far.requested() == (0, 6, 1)
        far.send(pages(0, 6, content(6)))
        assert answers.result() in ((2, 1, guest.gpa(6)), (EVERY_VCPU, 0, 0))


def unanswered(guest: AskingGuest, work: Callable[[], None]) -> None:
    """Does it in a thread that finds no memory for a datagram on the fault socket."""
    seccomp.deny("sendto", guest.ends[1].fileno(), errno.ENOBUFS)
    work()


def test_an_answer_that_is_lost_is_asked_for_again() -> None:
    """A lane that brings the page cannot answer, since the host lacks memory for that; the pager can."""
    with AskingGuest((PAGES, PAGE)) as guest, asked(guest) as far:
        guest.ask(3, 131)
        assert far.requested() == (0, 131, 1)
        Task(unanswered, guest, lambda: guest.line().feed(pages(0, 131, content(131)))).result()
        assert guest.answer()[0] == EVERY_VCPU
        problem = str(told(guest.destination, "stuck"))
        assert problem.startswith("fault socket: an answer was lost")
        assert problem.endswith(": No buffer space available")
        guest.ask(3, 131)
        assert guest.answer() == (3, 1, guest.gpa(131))


def test_a_host_that_lacks_memory_for_answers_is_not_kept_busy() -> None:
    """The pager itself cannot send: it tries when it is told to, and sleeps meanwhile."""
    with (
        AskingGuest((PAGES, PAGE)) as guest,
        RunningPager(within=lambda run: unanswered(guest, run)) as running,
        running.serving(guest),
    ):
        guest.line().feed(pages(0, 5, content(5)))
        guest.ask(1, 5)
        assert "an answer was lost" in str(told(guest.destination, "stuck"))
        before = running.pager.turns
        time.sleep(LONG_ENOUGH)
        assert running.pager.turns - before < 10
        running.pager.ask(guest.destination)
        assert guest.answer()[0] == EVERY_VCPU


def without_watches(run: Callable[[], None]) -> None:
    """Runs it in a thread that can neither add nor take away what an epoll set watches."""
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the directory that is being read
            if os.readlink(link) == "anon_inode:[eventpoll]":
                seccomp.deny("epoll_ctl", int(link.name), errno.ENOSPC)
    run()


def test_faults_that_cannot_be_watched_again_are_told() -> None:
    """With as many waits as there can be, nothing is watched; what the host lacks then would leave everybody asleep."""
    count = lib.GM_MAX_WAITS + 1
    with (
        AskingGuest((count, PAGE), vcpus=count) as guest,
        RunningPager(within=without_watches) as running,
        running.serving(guest),
    ):
        for page in range(count):
            guest.ask(page, page)
        until(lambda: guest.counter("waits") == lib.GM_MAX_WAITS)
        guest.destination.told_zero(0, 0, count - 1)

        def is_told() -> bool:  # each time that the pager looks; that nobody reads its answers is told as well
            running.pager.turn()
            return str(guest.destination.events().problem).startswith("userfaultfd cannot be watched again: No space")

        until(is_told)


def test_a_successor_has_everybody_ask_again() -> None:
    with AskingGuest((PAGES, PAGE)) as guest, asked(guest):
        guest.destination.ask_vcpus()
        assert guest.answer()[0] == EVERY_VCPU


def too_small() -> int:
    return sealed(PAGES // 8)


def unsealed() -> int:
    return sealed(PAGE, 0)


def no_memfd() -> int:
    return os.open("/dev/zero", os.O_RDWR)


def of_huge_pages() -> int:
    fd = os.memfd_create("huge", os.MFD_HUGETLB | os.MFD_ALLOW_SEALING)
    os.truncate(fd, 2 << 20)
    return fd


def not_writable() -> int:
    return sealed(PAGE, 0x2 | 0x8)  # F_SEAL_SHRINK, F_SEAL_WRITE


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (too_small, "region 0: its userfault bitmap has 25 bytes, 40 are needed"),
        (unsealed, "not sealed against shrinking"),
        (no_memfd, "is no memfd"),
        (of_huge_pages, "is no memfd of base pages"),
        (not_writable, "its userfault bitmap: Operation not permitted"),
    ],
)
def test_a_bitmap_that_cannot_be_trusted_is_refused(make: Callable[[], int], message: str) -> None:
    bitmap, file = make(), new_file(PAGES, PAGE)
    region = Region(offset=0, size=PAGES * PAGE, page_size=PAGE, gpa=0, bitmap=1, bitmap_offset=8)
    try:
        with pytest.raises(HandoffError, match=message):
            Memory("test", [region], [file, bitmap])
    finally:
        os.close(bitmap)
        os.close(file)
