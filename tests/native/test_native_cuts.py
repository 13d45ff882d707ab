"""Invariant 5, of parts of huge pages: what the VMM took out is zero, what it left comes."""

import mmap
import os
import struct
from collections.abc import Iterator

import pytest
from native_inside import Install
from native_rig import (
    EVENT_REMOVE,
    FEATURE_REMOVE,
    HUGE,
    PAGE,
    STATE_MESSAGES,
    Guest,
    Task,
    content,
    huge_pages,
    libc,
    libc_ffi,
    paged,
    told,
)

from gmemd.errors import HandoffError
from gmemd.native import crc32c
from gmemd.native.destination import Destination
from gmemd.native.memory import Memory, Populate

HALF = HUGE // 2
CUTS_AT, CUTS = 336, 32
STEPS = ["begin", "populate", "end", "nothing"]

ways = pytest.mark.parametrize("way", [Populate.COPY, Populate.RECV])


@pytest.fixture(autouse=True)
def _pool() -> Iterator[None]:
    with huge_pages(4):
        yield


def whole(page: int) -> bytes:
    return content(page, size=HUGE)


def cut(guest: Guest, start: int, length: int) -> None:
    """Removes bytes of the first region; returns when the event was read and the kernel has done its part."""
    address = libc_ffi.cast("void *", guest.hvas[0] + start)
    assert Task(libc.madvise, address, length, mmap.MADV_REMOVE).result() == 0


@ways
@pytest.mark.parametrize("cut_before", STEPS)
def test_a_part_of_a_huge_page_is_removed(way: Populate, cut_before: str) -> None:
    """Two halves, of two pages, that are missing, on their way, or there."""
    with Guest((2, HUGE), populate=way, features=FEATURE_REMOVE) as guest, paged(guest):
        guest.memory.keep_digests()
        for step in STEPS:
            if step == cut_before:
                cut(guest, HALF, HUGE)
            if step == "begin":
                installs = [Install(guest.destination, lane, page, 1) for page, lane in ((0, 1), (1, 2))]
            for page, steps in enumerate(installs):
                if step == "populate":
                    assert steps.populate(whole(page))
                if step == "end":
                    steps.finish()
        assert guest.received() == {0, 1}
        assert guest.read(0) == whole(0)[:HALF] + bytes(HALF)
        assert guest.read(1) == bytes(HALF) + whole(1)[HALF:]
        digests = struct.pack("<2I", *(crc32c(whole(page)) for page in range(2)))
        assert guest.memory.compare(0, 0, digests).mismatches == 0


@ways
def test_what_is_cut_out_of_a_frame_is_no_damage(way: Populate) -> None:
    """The lane that finds it half-zero goes on, and the claim is given back when it cannot be put in place."""
    with Guest((2, HUGE), populate=way, features=FEATURE_REMOVE) as guest, paged(guest):
        steps = Install(guest.destination, 1, 0, 1)
        assert steps.populate(whole(0))
        cut(guest, 3 * PAGE, 5 * PAGE)
        assert steps.give_up()
        assert guest.received() == set()
        again = Install(guest.destination, 1, 0, 1)
        assert again.populate(whole(0))
        again.finish()
        assert guest.read(0) == whole(0)[: 3 * PAGE] + bytes(5 * PAGE) + whole(0)[8 * PAGE :]


def arrive(memory: Memory) -> None:
    """The first page, at a successor."""
    destination = Destination(memory)
    steps = Install(destination, 1, 0, 1)
    assert steps.populate(whole(0))
    steps.finish()
    destination.close()


def test_a_successor_knows_of_cuts() -> None:
    """Of one that was noted, and of one that was read when its predecessor died."""
    with Guest((2, HUGE), populate=Populate.COPY, features=FEATURE_REMOVE) as guest:
        with paged(guest):
            cut(guest, HALF, PAGE)
        message = struct.pack("<B7xQQ8x", EVENT_REMOVE, guest.hva(0) + PAGE, guest.hva(0) + 2 * PAGE)
        state = guest.memory.state_fd
        os.pwrite(state, message, os.fstat(state).st_size - STATE_MESSAGES)
        with Memory.adopt(state, guest.files) as memory:
            arrive(memory)
        left = bytearray(whole(0))
        left[PAGE : 2 * PAGE] = left[HALF : HALF + PAGE] = bytes(PAGE)
        assert guest.held(0) == left


def test_cuts_that_touch_are_one() -> None:
    """Also when there are free places behind theirs, of a page that has come."""
    with Guest((2, HUGE), populate=Populate.COPY, features=FEATURE_REMOVE) as guest, paged(guest):
        cut(guest, HALF, PAGE)
        cut(guest, HUGE, PAGE)
        cut(guest, HUGE + HALF, PAGE)
        steps = Install(guest.destination, 1, 1, 1)
        assert steps.populate(whole(1))
        steps.finish()
        for page in range(1, 2 * CUTS):
            cut(guest, HALF + page * PAGE, PAGE)
        known = struct.unpack(f"<{CUTS}Q", os.pread(guest.memory.state_fd, 8 * CUTS, CUTS_AT))
        assert [word for word in known if word >> 10 < HUGE // PAGE and word] == [HALF // PAGE << 10 | 2 * CUTS]


def test_a_successor_without_room_for_cuts_takes_the_guest_over() -> None:
    with Guest((2, HUGE), populate=Populate.COPY, features=FEATURE_REMOVE) as guest:
        with paged(guest):
            for number in range(CUTS):
                cut(guest, 2 * number * PAGE, PAGE)
        message = struct.pack("<B7xQQ8x", EVENT_REMOVE, guest.hva(1) + PAGE, guest.hva(1) + 2 * PAGE)
        state = guest.memory.state_fd
        os.pwrite(state, message, os.fstat(state).st_size - STATE_MESSAGES)
        with Memory.adopt(state, guest.files) as memory:
            arrive(memory)


def test_more_cuts_than_are_remembered() -> None:
    """That is told; when a page has come, there is room again."""
    with Guest((2, HUGE), populate=Populate.COPY, features=FEATURE_REMOVE) as guest, paged(guest):
        for number in range(CUTS):
            cut(guest, 2 * number * PAGE, PAGE)
        assert not guest.destination.events().stuck
        cut(guest, HUGE + PAGE, PAGE)
        assert "the VMM removes parts of huge pages, here of page 1" in str(told(guest.destination, "stuck"))
        for page in (0, 1):
            if page:
                cut(guest, HUGE + PAGE, PAGE)
            steps = Install(guest.destination, 1, page, 1)
            assert steps.populate(whole(page))
            steps.finish()
        assert guest.read(0)[: 2 * PAGE] == bytes(PAGE) + whole(0)[:PAGE]
        assert guest.read(1) == whole(1)[:PAGE] + bytes(PAGE) + whole(1)[2 * PAGE :]


@pytest.mark.parametrize("word", [1 << 54 | 1, 2 * 512 << 10 | 1, 511 << 10 | 2, 1 << 10, 513])
def test_a_cut_that_cannot_be_is_not_believed(word: int) -> None:
    """Of another region, behind the end, over the border of a page, of nothing, of more than a page."""
    with Guest((2, HUGE), populate=Populate.COPY) as guest:
        os.pwrite(guest.memory.state_fd, struct.pack("<Q", word), CUTS_AT)
        with pytest.raises(HandoffError, match="state damaged: what was cut out of a page"):
            Memory.adopt(guest.memory.state_fd, guest.files)
