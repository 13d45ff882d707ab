"""Invariant 5: a page that the VMM took out is zero from then on, wherever its content was at that moment."""

import random
import struct
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import pytest
from native_frames import pages
from native_inside import Install, reading_events, removal_read
from native_rig import (
    FEATURE_REMOVE,
    HUGE,
    PAGE,
    WAYS,
    Guest,
    Line,
    RunningPager,
    Task,
    Way,
    content,
    huge_pages,
    paged,
    told,
    until,
)
from support.files import read_only

from gmemd.native import crc32c
from gmemd.native.memory import Memory, Populate, Verdict

if TYPE_CHECKING:
    from native_races import Races

pytest_plugins = ["native_races"]

LONG_ENOUGH = 0.02  # seconds in which a thread that does not wait is done

ways = pytest.mark.parametrize("way", WAYS)


def contents(first: int, count: int) -> bytes:
    return b"".join(content(page) for page in range(first, first + count))


def digests_of(numbers: Iterable[int]) -> bytes:
    return b"".join(struct.pack("<I", crc32c(content(page))) for page in numbers)


def install(guest: Guest, first: int, count: int = 1, lane: int = 1) -> Install:
    return Install(guest.destination, lane, first, count)


def balloon(guest: Guest, page: int, count: int = 1) -> None:
    """Removes pages; returns when the event was read and the pages are out, the pager may still be noting that."""
    Task(guest.remove, page, count).result()


@ways
def test_a_missing_page_that_is_removed_is_zero(way: Way) -> None:
    """Its content comes later, on every lane, and is dropped."""
    with Guest(populate=way, features=FEATURE_REMOVE) as guest, paged(guest) as far:
        balloon(guest, 5, 2)
        until(lambda: guest.received() == {5, 6})
        guest.line().feed(pages(0, 4, contents(4, 4)))
        far.send(pages(0, 5, contents(5, 1)))
        assert [guest.read(page) for page in (4, 5, 6, 7)] == [content(4), bytes(PAGE), bytes(PAGE), content(7)]
        assert guest.counter("removed_pages") == 2


@ways
def test_a_received_page_that_is_removed_is_zero(way: Way) -> None:
    with Guest(populate=way, features=FEATURE_REMOVE) as guest, paged(guest):
        line = guest.line()
        line.feed(pages(0, 5, content(5)))
        guest.write(5, b"the guest's")
        balloon(guest, 5)
        line.feed(pages(0, 5, content(5)))
        assert guest.read(5) == bytes(PAGE)
        guest.write(5, b"a new life")
        line.feed(pages(0, 5, content(5)))
        assert guest.read(5)[:10] == b"a new life"


def test_who_waits_for_a_page_that_is_removed_gets_zeros() -> None:
    with Guest(features=FEATURE_REMOVE) as guest, paged(guest) as far:
        reader = Task(guest.read, 5)
        far.requested()
        balloon(guest, 5)
        assert reader.result() == bytes(PAGE)


def test_a_range_of_many_words_is_removed() -> None:
    """In a region that is not the first, over borders of words, some of it received and some not."""
    with Guest((64, PAGE), (500, PAGE), features=FEATURE_REMOVE) as guest, paged(guest):
        line = guest.line()
        line.feed(pages(1, 100, contents(100, 64)))
        Task(guest.remove, 37, 401, 1).result()
        until(lambda: guest.received(1) == set(range(37, 438)))
        assert guest.received(0) == set()
        line.feed(pages(1, 30, contents(30, 64)), pages(1, 430, contents(430, 64)))
        for page in (30, 36, 37, 93, 100, 163, 437, 438, 493):
            assert guest.read(page, 1) == (bytes(PAGE) if 37 <= page < 438 else content(page)), page


STEPS = ["begin", "populate", "end"]


endings = pytest.mark.parametrize("ending", ["finish", "give up"])


@ways
@endings
@pytest.mark.parametrize("removed_before", [*STEPS, "nothing"])
def test_removed_at_any_step_of_an_install(way: Way, ending: str, removed_before: str) -> None:
    """Of four pages in flight two are removed, before each of the steps: they are zero, and stay so."""
    with Guest(populate=way, features=FEATURE_REMOVE) as guest, paged(guest):
        steps: Install | None = None
        for step in [*STEPS, "nothing"]:
            if step == removed_before:
                balloon(guest, 9, 2)
            if step == "begin":
                steps = install(guest, 8, 4)
            assert steps
            if step == "populate":
                assert steps.populate(contents(8, 4))
            if step == "end":
                steps.finish() if ending == "finish" else steps.give_up()
        expected = {8, 9, 10, 11} if ending == "finish" else {9, 10}
        until(lambda: guest.received() == expected)
        assert not guest.present(9)
        assert not guest.present(10)
        guest.line(2).feed(pages(0, 8, contents(8, 4)))
        assert [guest.read(page) for page in range(8, 12)] == [content(8), bytes(PAGE), bytes(PAGE), content(11)]


@ways
@pytest.mark.parametrize("removed_before", [*STEPS, "nothing"])
def test_what_is_removed_in_flight_is_not_compared(way: Way, removed_before: str) -> None:
    """It has no content. What was in place before it was removed had one."""
    with Guest(populate=way, features=FEATURE_REMOVE) as guest, paged(guest):
        guest.memory.keep_digests()
        for step in [*STEPS, "nothing"]:
            if step == removed_before:
                balloon(guest, 9, 2)
            if step == "begin":
                steps = install(guest, 8, 4)
            if step == "populate":
                assert steps.populate(contents(8, 4))
            if step == "end":
                steps.finish()
        verdict = guest.memory.compare(0, 8, digests_of(range(8, 12)))
        assert verdict == (Verdict(4) if removed_before == "nothing" else Verdict(2, 2))
        zeros = install(guest, 20, 2)
        assert zeros.populate(None)
        zeros.finish()
        theirs = struct.pack("<3I", crc32c(bytes(PAGE)), 7, 7)
        assert guest.memory.compare(0, 20, theirs) == Verdict(2, 1, 1, 0, 21)


def test_removed_while_digests_are_made(rng: random.Random) -> None:
    """Whatever is kept of a page is of its content, and never of the hole that the VMM made of it."""
    count = 300 * 64
    with Guest((count, PAGE), features=FEATURE_REMOVE) as guest, paged(guest):
        guest.memory.keep_digests()
        data = content(0) * 64
        for first in range(0, count, 64):
            steps = install(guest, first, 64)
            assert steps.populate(data)
            removing = Task(guest.remove, first + 63, 1)
            until_then = time.perf_counter() + rng.random() * 300e-6
            while time.perf_counter() < until_then:
                pass
            steps.finish()
            removing.result()
        verdict = guest.memory.compare(0, 0, digests_of([0]) * count)
        assert (verdict.mismatches, verdict.verified + verdict.left_out) == (0, count)


def test_removed_while_claims_are_given_back() -> None:
    """The moment between looking for removals and giving the claims back, made long by pages to punch in between."""
    for round_ in range(30):
        with Guest() as guest:
            steps = install(guest, 0, 64)
            assert steps.populate(contents(0, 64))
            early, late = set(range(0, 60, 2)), 63
            for page in early:
                removal_read(guest.destination, page, 1)
            giving = Task(steps.give_up)
            while guest.present(0):  # it is about to punch the others
                pass
            removal_read(guest.destination, late, 1)
            giving.result()
            assert guest.received() == {*early, late}, f"round {round_}"


def test_who_waits_for_a_page_removed_from_a_claim_that_is_given_back() -> None:
    """It is received then, though no content came: nobody else would wake who waits."""
    with Guest(features=FEATURE_REMOVE) as guest, paged(guest) as far:
        steps = install(guest, 5)
        reader = Task(guest.read, 5)
        far.requested()
        balloon(guest, 5)
        steps.give_up()
        assert reader.result() == bytes(PAGE)


def end_uncleared(guest: Guest, ending: str) -> None:
    """Pages 8 to 11 in flight, of which 9 and 10 are removed and cannot be taken out."""
    steps = install(guest, 8, 4)
    assert steps.populate(contents(8, 4))
    removal_read(guest.destination, 9, 2)
    with read_only(guest.files[0]):
        steps.finish() if ending == "finish" else steps.give_up()
    said = "region 0: pages 9 to 10, which the VMM removed while they came, cannot be cleared: Bad file descriptor"
    assert str(told(guest.destination, "stuck")) == said
    assert guest.received() == ({8, 11} if ending == "finish" else set())


@endings
@pytest.mark.parametrize("way", [Populate.WRITE, Populate.RECV])
def test_what_cannot_be_taken_out_is_not_seen(way: Populate, ending: str) -> None:
    """Who wants it waits, and the lane goes no further, until it is out; a background lane loses nothing by that."""
    with Guest(populate=way) as guest, paged(guest) as far:
        end_uncleared(guest, ending)
        reader = Task(guest.read, 9)
        assert far.requested() == (0, 9, 1)
        far.send(pages(0, 9, content(9)))
        until(lambda: guest.counter("dropped_pages") == 1)
        line = guest.line()
        with read_only(guest.files[0]):
            line.feed(pages(0, 20, content(20)))
            assert line.lane.held
            told(guest.destination, "stuck")
        assert reader.is_alive()
        assert not {9, 10, 20} & guest.received()
        line.deal()
        assert reader.result() == bytes(PAGE)
        assert {9, 10, 20} <= guest.received()
        line.feed(pages(0, 8, contents(8, 4)))
        assert [guest.read(page) for page in (8, 10, 11, 20)] == [content(8), bytes(PAGE), content(11), content(20)]


def test_what_cannot_be_taken_out_is_tried_again_without_its_lane() -> None:
    """The urgent lane when nobody waits, and a lane that a source which came back does not have any more."""
    with Guest() as guest, RunningPager() as running, running.serving(guest) as far:
        end_uncleared(guest, "finish")
        with read_only(guest.files[0]):
            running.pager.ask(guest.destination)
            told(guest.destination, "stuck")
        reader = Task(guest.read, 9)
        assert far.requested() == (0, 9, 1)
        running.pager.ask(guest.destination)
        assert reader.result() == bytes(PAGE)
        assert guest.received() == {8, 9, 10, 11}


@endings
def test_a_successor_takes_out_what_could_not_be(ending: str) -> None:
    with Guest() as guest:
        end_uncleared(guest, ending)
        with Memory.adopt(guest.memory.state_fd, guest.files) as memory:
            assert memory.received == (4 if ending == "finish" else 2)
            assert guest.received() == ({8, 9, 10, 11} if ending == "finish" else {9, 10})
            assert not guest.present(9)
            assert not guest.present(10)


def feed(line: Line, starts: range) -> None:
    """Frames of 32 pages each."""
    for first in starts:
        line.feed(pages(0, first, contents(first, 32)))


def deflate(guest: Guest, seed: float) -> set[int]:
    """Removes pages here and there until the rest is received; looks at some; returns those removed."""
    own, gone, count = random.Random(seed), set[int](), guest.shapes[0][0]
    while len(guest.received()) < count:
        page = own.randrange(count - 4)
        guest.remove(page, 4)
        gone.update(range(page, page + 4))
        seen = guest.read(page)
        assert seen == bytes(PAGE), f"page {page} came back: {seen[:16].hex()}"
    return gone


@ways
def test_removals_and_arrivals_race(way: Way, rng: random.Random) -> None:
    """Two lanes, a balloon and a reader at once. Once a removal is done, the page reads as zeros, whatever comes."""
    count, rounds = 1024, 3
    digests = digests_of(range(count))
    for _ in range(rounds):
        with Guest((count, PAGE), populate=way, features=FEATURE_REMOVE) as guest, paged(guest) as far:
            guest.memory.keep_digests()
            starts = range(0, count, 32)
            feeders = [
                Task(feed, guest.line(1), starts),
                Task(feed, guest.line(2), starts[::-1]),
            ]
            balloons = [Task(deflate, guest, rng.random()) for _ in range(2)]
            gone = balloons[0].result() | balloons[1].result()
            for task in feeders:
                task.result()
            # All once more: what a frame had beside a page that went has been asked for again, what is gone stays gone.
            far.send(b"".join(pages(0, page, content(page)) for page in range(count)))
            until(far.all_sent)
            assert gone
            assert not guest.counter("damaged_frames")
            for page in range(count):
                assert guest.read(page) == (bytes(PAGE) if page in gone else content(page)), page
            verdict = guest.memory.compare(0, 0, digests)
            assert (verdict.mismatches, verdict.verified + verdict.left_out) == (0, count)


def test_a_lane_neither_begins_nor_ends_while_events_are_read() -> None:
    """What was read may have been punched already: it has to be noted before the lane looks, and in the right frame."""
    with Guest() as guest:
        steps = install(guest, 8, 4)
        assert steps.populate(contents(8, 4))
        with reading_events(guest.destination) as removed:
            ending, beginning = Task(steps.finish), Task(install, guest, 20, 4, 2)
            time.sleep(LONG_ENOUGH)
            waiting = (ending.is_alive(), beginning.is_alive())
            removed(9, 2)
        ending.result()
        assert beginning.result().claimed == {20, 21, 22, 23}
        assert waiting == (True, True)
        assert guest.received() == {8, 9, 10, 11}
        assert [guest.present(page) for page in (8, 9, 10, 11)] == [True, False, False, True]


def test_removed_just_when_a_lane_begins(races: "Races") -> None:
    """Either the removal finds the page missing, or the lane finds the note."""
    with Guest((1 << 14, PAGE)) as guest:
        assert races.removal(guest.destination) == 0
        assert guest.memory.received == 1 << 14


@ways
def test_what_the_vmm_says_it_discarded_is_zero(way: Way) -> None:
    """No event tells of a hole that the VMM punches itself: it says so, and the same holds."""
    with Guest(populate=way) as guest, paged(guest):
        line = guest.line()
        line.feed(pages(0, 3, contents(3, 1)))
        steps = install(guest, 5, 2, lane=2)
        assert steps.populate(contents(5, 2))
        guest.destination.discard(0, 3, 3)
        steps.finish()
        assert guest.received() == {3, 4, 5, 6}
        line.feed(pages(0, 3, contents(3, 4)))
        assert [guest.read(page) for page in range(3, 7)] == [bytes(PAGE)] * 3 + [content(6)]


def test_a_huge_page_is_removed() -> None:
    with huge_pages(4), Guest((4, HUGE), populate=Populate.COPY, features=FEATURE_REMOVE) as guest, paged(guest):
        line = guest.line()
        line.feed(*(pages(0, page, content(page, size=HUGE), HUGE) for page in (0, 1)))
        balloon(guest, 1, 2)
        line.feed(*(pages(0, page, content(page, size=HUGE), HUGE) for page in (1, 2, 3)))
        zeros = bytes(HUGE)
        assert [guest.read(page) == zeros for page in range(4)] == [False, True, True, False]
