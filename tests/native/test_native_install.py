"""Install: claim, populate, mark, continue. Once, in that order, and given back where it fails."""

import errno
import mmap
import os
import random
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from native_frames import beat, pages, zeros
from native_inside import Install
from native_rig import (
    HUGE,
    LARGE_FOLIOS,
    PAGE,
    STATE_MESSAGES,
    WAYS,
    Guest,
    Task,
    Way,
    content,
    huge_pages,
    paged,
    scratch,
    told,
    until,
    watched,
)

from gmemd.errors import HandoffError, KernelError
from gmemd.native.memory import Populate

NOT_PUT = "cannot be put in place"

ways = pytest.mark.parametrize("way", WAYS)


def install(guest: Guest, first: int, count: int = 1, lane: int = 1) -> Install:
    return Install(guest.destination, lane, first, count)


def contents(first: int, count: int, version: int = 0) -> bytes:
    return b"".join(content(page, version=version) for page in range(first, first + count))


@ways
def test_the_first_copy_wins(way: Way) -> None:
    """Invariant 1: what the guest writes into a page stays, on whichever lane the page comes once more."""
    with Guest(populate=way) as guest, watched(guest):
        background, another, urgent = guest.line(1), guest.line(2), guest.line(0)
        background.feed(pages(0, 3, content(3)))
        guest.write(3, b"written by the guest")
        seen = guest.read(3)
        for line in (background, another, urgent):
            line.feed(pages(0, 3, content(3)))
            line.feed(pages(0, 0, contents(0, 8)))
            line.feed(zeros(0, 2, 2))
        assert guest.read(3) == seen
        assert guest.received() == set(range(8))
        assert guest.counter("dropped_pages") == 3 + 1 + 8 + 8 + 3 * 2


@ways
def test_what_is_missing_of_a_frame_is_installed(way: Way) -> None:
    """A frame whose pages are here in part, in several runs: the rest of it goes to its own places."""
    with Guest(populate=way) as guest:
        line = guest.line()
        here = {8, 9, 15, 40, 63}
        for page in here:
            line.feed(pages(0, page, content(page, version=1)))
        line.feed(pages(0, 0, contents(0, 64)))
        for page in range(64):
            assert guest.read(page) == content(page, version=1 if page in here else 0)


@ways
def test_a_page_is_not_seen_before_it_is_whole(way: Way) -> None:
    """Invariants 2 and 3, step by step: neither claimed nor populated lets a reader through; finished does."""
    with Guest(populate=way) as guest, paged(guest) as far:
        steps = install(guest, 5)
        early = Task(guest.read, 5)  # finds the page missing
        assert far.requested() == (0, 5, 1)
        assert steps.populate(content(5))
        late = Task(guest.read, 5)  # finds it in the page cache
        until(lambda: guest.counter("faults_minor") == 1)
        assert (guest.counter("waits"), guest.received()) == (2, set())
        assert early.is_alive()
        assert late.is_alive()
        steps.finish()
        assert early.result() == late.result() == content(5)
        assert guest.received() == {5}


@ways
def test_readers_see_only_whole_pages(way: Way, rng: random.Random) -> None:
    """The same without any order of ours: threads that read ahead of the lane."""
    count = 2048
    with Guest((count, PAGE), populate=way) as guest, paged(guest):
        line = guest.line()

        def read(seed: float) -> None:
            for page in random.Random(seed).sample(range(count), count):
                assert guest.read(page) == content(page), page

        readers = [Task(read, rng.random()) for _ in range(3)]
        for first in range(0, count, 16):
            line.feed(pages(0, first, contents(first, 16)))
        for reader in readers:
            reader.result()


@contextmanager
def mapped_state(guest: Guest) -> Iterator[mmap.mmap]:
    fd = guest.memory.state_fd
    with mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED) as state:
        yield state


def test_a_page_that_is_seen_is_marked() -> None:
    """Received first, mapped then: whoever dies in between has not shown a page that would be asked for again. Frames
    of many runs make that moment long; who waits for the first page looks at once whether it is received."""
    count = 60 * 64
    with Guest((count, PAGE)) as guest, paged(guest) as far, scratch(b"") as out, mapped_state(guest) as state:
        line, received = guest.line(), len(state) - STATE_MESSAGES - count // 8

        def look(page: int) -> bool:
            with memoryview(guest.maps[0])[page * PAGE : page * PAGE + 8] as view:
                os.pwrite(out, view, 0)
            return bool(state[received + page // 8] >> page % 8 & 1)

        for first in range(0, count, 64):
            line.feed(*(pages(0, page, content(page)) for page in range(first + 1, first + 64, 2)))
            reader = Task(look, first)
            assert far.requested() == (0, first, 1)
            line.feed(pages(0, first, contents(first, 64)))
            assert reader.result(), f"page {first} was seen before it was marked"


@ways
def test_a_claim_is_given_back_when_populate_fails(way: Way) -> None:
    """The pages are missing again, whatever half of them was written; the next copy is installed."""
    with Guest(populate=way) as guest, watched(guest):
        steps = install(guest, 4, 4)
        assert steps.claimed == {4, 5, 6, 7}
        assert steps.populate(contents(4, 4, version=1))
        steps.give_up()
        assert guest.received() == set()
        again = install(guest, 2, 4)
        assert again.claimed == {2, 3, 4, 5}
        assert again.populate(contents(2, 4))
        again.finish()
        for page in range(2, 6):
            assert guest.read(page) == content(page)


@ways
def test_only_own_claims_are_given_back(way: Way) -> None:
    """A frame that fails had not claimed what was here before; that stays as the guest left it."""
    with Guest(populate=way) as guest, watched(guest):
        line = guest.line(2)
        line.feed(pages(0, 5, content(5)))
        guest.write(5, b"the guest's")
        steps = install(guest, 4, 4)
        assert steps.claimed == {4, 6, 7}
        steps.give_up()
        line.feed(pages(0, 4, contents(4, 4)))
        assert guest.read(5)[:11] == b"the guest's"
        assert [guest.read(page) for page in (4, 6, 7)] == [content(page) for page in (4, 6, 7)]


def test_zeros_after_a_failed_populate_are_zeros() -> None:
    """What a failed attempt left in the file does not show through a hole."""
    with Guest() as guest:
        for page in range(3):
            steps = install(guest, page)
            assert steps.populate(content(page, version=1))
            steps.give_up()
        assert guest.destination.told_zero(0, 0, 1) == 1
        guest.line().feed(zeros(0, 1, 1))
        assert (guest.held(0), guest.held(1)) == (bytes(PAGE), bytes(PAGE))
        assert guest.received() == {0, 1}


@pytest.mark.parametrize("way", [Populate.COPY, Populate.RECV])
def test_a_truncated_memory_file_is_the_vmms_fault(way: Way) -> None:
    """No SIGBUS: the pages are named, the lane lives, and a copy that comes once the file is mended is installed."""
    with Guest(populate=way) as guest, watched(guest):
        line = guest.line()
        os.truncate(guest.files[0], 4 * PAGE)
        line.feed(pages(0, 2, contents(2, 4)), pages(0, 0, content(0)))
        problem = told(guest.destination, "stuck")
        assert isinstance(problem, HandoffError)
        assert str(problem) == "region 0: pages 2 to 5 cannot be put in place: Bad address"
        assert guest.received() == {0}
        os.truncate(guest.files[0], 64 * PAGE)
        line.feed(pages(0, 2, contents(2, 4)))
        for page in (0, 2, 3, 4, 5):
            assert guest.read(page) == content(page)


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 16 pages."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={16 * PAGE}", "tmpfs", tmp_path], check=False)
    if mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@ways
def test_a_full_tmpfs_lets_go_on_once_there_is_room(way: Way, small_tmpfs: Path) -> None:
    """ENOSPC in the middle of a frame, of which one page is here: said, given back, kept, and tried again."""
    filler = small_tmpfs / "filler"
    filler.write_bytes(bytes(13 * PAGE))
    fd = os.open(small_tmpfs / "memory", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    os.truncate(fd, 16 * PAGE)
    with Guest((16, PAGE), populate=way, files=[fd]) as guest:
        line = guest.line()
        line.feed(pages(0, 1, content(1, version=1)))
        line.feed(pages(0, 0, contents(0, 8)))
        problem = told(guest.destination, "stuck")
        assert isinstance(problem, KernelError)
        assert re.fullmatch(f"region 0: pages [02] to [07] {NOT_PUT}: No space left on device", str(problem))
        assert problem.errno == errno.ENOSPC
        assert line.lane.held
        assert guest.received() == {1}
        filler.unlink()
        line.deal()
        line.feed(pages(0, 8, contents(8, 8)))
        for page in range(16):
            assert guest.read(page) == content(page, version=int(page == 1))
        assert (guest.counter("damaged_frames"), guest.counter("background_pages")) == (0, 16)


def test_a_page_removed_from_a_frame_without_room(small_tmpfs: Path) -> None:
    """What the VMM took out while there was no room for the rest stays out when there is."""
    filler = small_tmpfs / "filler"
    filler.write_bytes(bytes(14 * PAGE))
    fd = os.open(small_tmpfs / "memory", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    os.truncate(fd, 8 * PAGE)
    with Guest((8, PAGE), populate=Populate.RECV, files=[fd]) as guest:
        line = guest.line()
        line.feed(pages(0, 0, contents(0, 8)))
        assert line.lane.held
        guest.destination.discard(0, 1, 1)
        filler.unlink()
        line.deal()
        assert guest.held(1) == bytes(PAGE)
        for page in {*range(8)} - {1}:
            assert guest.read(page) == content(page)


@pytest.mark.parametrize("way", [Populate.COPY, Populate.RECV])
def test_an_empty_huge_page_pool_lets_go_on_once_it_has_some(way: Way) -> None:
    with huge_pages(1) as pool, Guest((2, HUGE), populate=way, reserve=False) as guest:
        line = guest.line()
        line.feed(pages(0, 0, content(0, size=HUGE), HUGE))
        line.feed(pages(0, 1, content(1, size=HUGE), HUGE))
        assert f"pages 1 to 1 {NOT_PUT}: No space left" in str(told(guest.destination, "stuck"))
        assert guest.received() == {0}
        assert line.lane.held
        pool(2)
        line.deal()
        for page in range(2):
            assert guest.read(page) == content(page, size=HUGE)


@ways
def test_zero_pages_stay_holes(way: Way) -> None:
    """Nothing is allocated for them, neither when a frame says so nor when the source told it up front."""
    with Guest((256, PAGE), populate=way) as guest:
        guest.line().feed(*(zeros(0, first, 64) for first in (0, 64)))
        assert guest.destination.told_zero(0, 100, 100) == 200 - 128
        assert guest.received() == set(range(200))
        assert os.fstat(guest.files[0]).st_blocks == 0
        assert guest.counter("zero_pages") == 200


def test_faults_on_known_zeros_need_no_request() -> None:
    """They are answered here: a beat sent after them is the first that the source hears."""
    with Guest() as guest:
        guest.destination.told_zero(0, 0, 32)
        guest.line().feed(zeros(0, 32, 16))
        with paged(guest) as far:
            readers = [Task(guest.read, page) for page in range(48)]
            assert [reader.result() for reader in readers] == [bytes(PAGE)] * 48
            reader = Task(guest.read, 50)
            assert far.requested() == (0, 50, 1)
            far.send(pages(0, 50, content(50)))
            reader.result()
        assert guest.counter("requests") == 1


def test_who_waits_is_answered_by_a_told_zero() -> None:
    with Guest() as guest, paged(guest) as far:
        reader = Task(guest.read, 7)
        far.requested()
        assert guest.destination.told_zero(0, 0, 64) == 64
        assert reader.result() == bytes(PAGE)


def test_complete_is_a_full_bitmap_and_nothing_else() -> None:
    """Invariant 6: told once, with the last page, however many copies came before and by whatever it came."""
    with Guest((130, PAGE), (3, PAGE)) as guest:
        line = guest.line()
        for _ in range(3):
            line.feed(pages(0, 0, contents(0, 64)), pages(0, 64, contents(64, 64)), zeros(0, 128, 1), beat())
        guest.destination.told_zero(1, 0, 2)
        guest.destination.discard(1, 2, 1)
        assert not guest.destination.events().complete
        assert guest.memory.received == guest.memory.pages - 1
        line.feed(pages(0, 129, content(129)))
        assert guest.destination.events().complete
        assert guest.memory.received == guest.memory.pages
        line.feed(pages(0, 129, content(129)))
        assert not guest.destination.events().complete


def blocks(guest: Guest) -> int:
    """Pages that its memory file takes up."""
    return os.fstat(guest.files[0]).st_blocks * 512 // PAGE


def test_who_waits_for_a_page_does_not_wait_for_2_mib() -> None:
    """In large folios, a write() of one page would bring the folio in, and zero it, before the page is there."""
    with Guest((512, PAGE), populate=LARGE_FOLIOS) as guest, paged(guest) as far:
        waiting = Task(guest.read, 5)
        assert far.requested() == (0, 5, 1)
        far.send(pages(0, 5, content(5)))
        assert waiting.result() == content(5)
        guest.line().feed(zeros(0, 300, 1))
        assert guest.read(300) == bytes(PAGE)
        assert blocks(guest) == 2


def test_what_a_large_folio_brings_along_is_still_missing() -> None:
    with Guest((512, PAGE), populate=LARGE_FOLIOS) as guest, paged(guest) as far:
        line = guest.line()
        line.feed(pages(0, 0, contents(0, 64)))
        assert blocks(guest) == 512
        waiting = Task(guest.read, 64)
        assert far.requested() == (0, 64, 1)
        assert guest.counter("faults_minor") == 1
        far.send(pages(0, 64, content(64)))
        assert waiting.result() == content(64)
        line.feed(pages(0, 65, contents(65, 64)))
        assert [guest.read(page) for page in range(64, 129)] == [content(page) for page in range(64, 129)]
