"""Parts of guest memory that nothing is missing of leave the userfaultfd, and no others. Nobody reads faults here: a
thread that has one waits until its piece is let go."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from native_frames import pages, zeros
from native_inside import Install
from native_rig import FEATURE_REMOVE, LARGE_FOLIOS, PAGE, WAYS, Guest, Line, Task, Way, content, until

PIECE = 512  # pages of a guest of up to 32 GiB
GIB = (1 << 30) // PAGE
FRAME = 64

ways = pytest.mark.parametrize("way", WAYS)


def send(line: Line, wanted: Iterable[int]) -> None:
    """The frames that hold these pages, as long as they follow each other."""
    left = sorted(wanted)
    while left:
        run = 1
        while run < min(len(left), FRAME) and left[run] == left[0] + run:
            run += 1
        line.feed(pages(0, left[0], b"".join(map(content, left[:run]))))
        del left[:run]


def waits(guest: Guest, page: int) -> Task[bytes]:
    """Somebody who has touched the page, and sleeps."""
    before = guest.unread_faults()
    reader = Task(guest.read, page)
    until(lambda: guest.unread_faults() == before + 1)
    return reader


@ways
def test_a_complete_piece_needs_nobody(way: Way) -> None:
    """And an incomplete one waits for what is missing of it, wherever that is."""
    with Guest((2 * PIECE + 100, PAGE), populate=way) as guest:
        line = guest.line()
        for first, count, last in (0, PIECE, 0), (PIECE, PIECE, 2 * PIECE - 1), (2 * PIECE, 100, 2 * PIECE + 50):
            send(line, {*range(first, first + count)} - {last})
            received, missing = waits(guest, first + 1), waits(guest, last)
            assert guest.unread_faults() == 2
            send(line, [last])
            assert (received.result(), missing.result()) == (content(first + 1), content(last))
            for page in range(first, first + count):
                assert guest.read(page) == content(page)


def test_a_lane_looks_back() -> None:
    """Over a slow link a page that was asked for comes when the background is past its piece."""
    with Guest((3 * PIECE, PAGE)) as guest:
        line = guest.line(1)
        send(line, {*range(PIECE)} - {9})
        reader = waits(guest, 3)
        send(guest.line(0), [9])
        send(line, range(PIECE, 2 * PIECE + 1))
        assert (reader.result(), guest.read(9)) == (content(3), content(9))


def test_nothing_is_let_go_of_after_the_end() -> None:
    """When the VMM was told that all is done, its userfaultfd is its own again."""
    with Guest((PIECE, PAGE)) as guest:
        send(guest.line(), range(PIECE))
        assert guest.destination.events().complete
        assert guest.memory.unregister()
        guest.memory.register()
        assert guest.destination.told_zero(0, 0, PIECE) == 0
        guest.line(2).feed(pages(0, 7, content(7)), zeros(0, 8, 2))
        reader = waits(guest, 3)
        guest.memory.unregister()
        assert reader.result() == content(3)


def test_a_frame_may_complete_two_pieces() -> None:
    with Guest((2 * PIECE, PAGE)) as guest:
        line = guest.line()
        last = range(PIECE - 7, PIECE + 9)
        send(line, {*range(2 * PIECE)} - {*last})
        send(line, last)
        assert [guest.read(page) for page in (0, PIECE, 2 * PIECE - 1)] == list(map(content, (0, PIECE, 2 * PIECE - 1)))


def test_holes_are_let_go_of_too() -> None:
    """Those that the source tells at once, and those that come in frames; but not what has content among them."""
    with Guest((4 * PIECE, PAGE)) as guest:
        line = guest.line()
        send(line, [PIECE + 3])
        assert guest.destination.told_zero(0, 0, 4 * PIECE - 70) == 4 * PIECE - 71
        for page in (0, PIECE - 1, PIECE, 2 * PIECE, 3 * PIECE - 1):
            assert guest.read(page) == bytes(PAGE)
        assert guest.read(PIECE + 3) == content(PIECE + 3)
        last = waits(guest, 4 * PIECE - 1)
        line.feed(zeros(0, 4 * PIECE - 70, 60), zeros(0, 4 * PIECE - 10, 10))
        assert last.result() == bytes(PAGE)


def test_pages_on_their_way_are_not_let_go_of() -> None:
    """Of holes that are told, some pages are claimed already: they may come with content."""
    with Guest((PIECE, PAGE)) as guest:
        steps = Install(guest.destination, 1, 5, 1)
        guest.destination.told_zero(0, 0, PIECE)
        reader = waits(guest, 5)
        assert steps.populate(content(5))
        steps.finish()
        assert reader.result() == content(5)


def test_what_is_removed_from_a_piece_that_was_let_go_of_is_zero() -> None:
    """No event comes for it, and nobody has to read one."""
    with Guest((PIECE, PAGE), features=FEATURE_REMOVE) as guest:
        send(guest.line(), range(PIECE))
        assert guest.read(7) == content(7)
        guest.remove(7)
        assert guest.read(7) == bytes(PAGE)
        guest.write(7, b"written")
        guest.line(2).feed(pages(0, 7, content(7)))
        assert guest.read(7) == b"written".ljust(PAGE, b"\0")


def mappings(guest: Guest) -> list[str]:
    """The lines of smaps that begin the guest's mappings."""
    start, end = guest.hva(0), guest.hva(guest.shapes[0][0])
    lines = re.findall(r"^([0-9a-f]+)-[0-9a-f]+ .*", Path("/proc/self/smaps").read_text(), re.MULTILINE)
    return [line for line in lines if start <= int(line, 16) < end]


def test_pieces_join() -> None:
    """Whatever order they come in, a VMM has one mapping in the end."""
    with Guest((8 * PIECE, PAGE)) as guest:
        line = guest.line()
        for piece in 1, 3, 5:
            send(line, range(piece * PIECE, (piece + 1) * PIECE))
        assert len(mappings(guest)) == 7
        for piece in 0, 6, 4, 2, 7:
            send(line, range(piece * PIECE, (piece + 1) * PIECE))
        assert len(mappings(guest)) == 1


def test_large_guests_have_larger_pieces() -> None:
    """A process may have 65530 mappings, and no guest takes more than a quarter."""
    with Guest((64 * GIB, PAGE), reserve=False) as guest:
        line = guest.line()
        send(line, range(PIECE))
        reader = waits(guest, 0)
        send(line, range(PIECE, 2 * PIECE))
        assert reader.result() == content(0)


def test_a_piece_of_a_large_folio_is_mapped_as_one() -> None:
    with Guest((PIECE, PAGE), populate=LARGE_FOLIOS) as guest:
        if guest.hva(0) % (PIECE * PAGE):
            pytest.skip("the kernel maps files in huge folios where they cannot be mapped so")
        send(guest.line(), range(PIECE))
        assert guest.read(0) == content(0)
        smaps = Path("/proc/self/smaps").read_text().partition(f"{guest.hva(0):x}-")[2]
        assert re.search(r"^ShmemPmdMapped: +(\d+) kB", smaps, re.MULTILINE)[1] == str(PIECE * PAGE // 1024)  # type: ignore[index]
