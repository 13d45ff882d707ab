"""Lanes fed with raw bytes: good ones arrive however they are cut, bad ones end the lane and harm nothing else."""

import gc
import random
import socket
import time
from dataclasses import replace

import pytest
from native_frames import HEADER, PAGES, ZERO, Frame, beat, pages, zeros
from native_rig import PAGE, POLL_US, Guest, Line, RunningPager, Task, content, paged, told, until, watched

from gmemd.errors import GmemdError, LinkError, ProtocolError
from gmemd.native.destination import Destination, Lane, Pager
from gmemd.native.memory import Memory, Populate

ways = pytest.mark.parametrize("way", list(Populate))
# Through the lane's buffer, and past it.
SILENCE = 0.1  # seconds; the kernel tells to within 10 ms when something last came
both_paths = pytest.mark.parametrize("way", [Populate.WRITE, Populate.RECV])


def contents(first: int, count: int) -> bytes:
    return b"".join(content(page) for page in range(first, first + count))


@both_paths
@pytest.mark.parametrize("checksum", [True, False])
def test_bytes_arrive_however_they_are_cut(way: Populate, checksum: bool, rng: random.Random) -> None:
    """Pieces of any size, also many frames at once: the lane looks at each only when it is whole."""
    with Guest((256, PAGE), populate=way) as guest:
        line = guest.line(checksum=checksum)
        parts, at = [], 0
        while at < 256:
            count = min(rng.choice([1, 1, 2, 17, 64]), 256 - at)
            parts.append(rng.choice([pages(0, at, contents(at, count)), zeros(0, at, count)]))
            parts.append(beat())
            at += count
        data = b"".join(parts)
        while data:
            cut = rng.choice([1, 3, 31, 32, 33, 4096, 100_000, len(data)])
            line.feed(data[:cut])
            data = data[cut:]
        assert guest.received() == set(range(256))
        assert guest.counter("zero_pages") + guest.counter("background_pages") == 256
        for page in range(256):
            assert guest.held(page) in (content(page), bytes(PAGE))


def test_a_frame_comes_whole_though_the_socket_holds_less() -> None:
    """A receive buffer smaller than a frame: straight into the alias is then not possible, and not needed."""
    with Guest(populate=Populate.RECV) as guest:
        line = guest.line()
        line.near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        line.feed(pages(0, 0, contents(0, 64)), pages(0, 3, contents(3, 2)))
        for page in range(64):
            assert guest.read(page) == content(page)


def test_a_beat_is_heard() -> None:
    with Guest() as guest:
        line = guest.line()
        before = line.lane.heard_ns
        line.lane.receive(1000)
        assert line.lane.heard_ns == before, "silence is not"
        line.feed(beat())
        assert line.lane.heard_ns > before
        assert guest.received() == set()


def test_a_frame_that_comes_slowly_is_heard() -> None:
    """It is left in the socket until all of it is there: that it comes is a sign of life all the same."""
    with Guest(populate=Populate.RECV) as guest:
        line = guest.line()
        frame = pages(0, 0, contents(0, 64))
        line.feed(frame[:10_000])
        before = line.lane.heard_ns
        time.sleep(SILENCE)
        line.far.send(frame[10_000:20_000])
        until(lambda: line.lane.heard_ns > before + SILENCE * 1e9 / 2)
        line.feed(frame[20_000:])
        assert guest.received() == set(range(64))


def test_a_budget_ends_a_busy_lane() -> None:
    """Of a lane that never falls silent: it comes back for others to be looked at."""
    with Guest((4096, PAGE)) as guest:
        line = guest.line()
        data = b"".join(pages(0, first, contents(first, 64)) for first in range(0, 4096, 64))
        sender = Task(line.far.send, data)
        until(lambda: line.lane.receive(10))
        assert len(guest.received()) < 4096
        while len(guest.received()) < 4096:
            line.lane.receive(50_000)
        sender.result()


GOOD = Frame(kind=PAGES, region=0, first=7, count=2, length=2 * PAGE)
HOSTILE: dict[str, bytes] = {
    "magic": replace(GOOD, magic=0).sealed(contents(7, 2)).encode(),
    "kind": replace(GOOD, kind=9).sealed(contents(7, 2)).encode(),
    "a request": replace(GOOD, kind=1, length=0).sealed().encode(),
    "region": replace(GOOD, region=3).sealed(contents(7, 2)).encode(),
    "out of bounds": replace(GOOD, first=63).sealed(contents(7, 2)).encode(),
    "wrapped around": replace(GOOD, first=2**64 - 1).sealed(contents(7, 2)).encode(),
    "no pages": replace(GOOD, count=0, length=0).sealed().encode(),
    "too many": replace(GOOD, kind=ZERO, first=0, count=1 << 31, length=0).sealed().encode(),
    "too long": replace(GOOD, length=(1 << 32) - 1).sealed().encode(),
    "too short": replace(GOOD, length=PAGE).sealed(content(7)).encode(),
}
NOT_FRAMES: dict[str, bytes] = {"text": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "zeros": bytes(64)}


@both_paths
@pytest.mark.parametrize("what", [*HOSTILE, *NOT_FRAMES])
def test_a_hostile_frame_ends_its_lane_and_harms_nothing_else(way: Populate, what: str) -> None:
    """What came before it is in place, what comes behind it is not looked at, and another lane goes on."""
    with Guest((64, PAGE), (2, 4 * PAGE), populate=way) as guest, watched(guest):
        line, other = guest.line(1), guest.line(2)
        line.feed(pages(0, 1, content(1)))
        # What no peer of ours can have sent is for its operator; the rest may be the link's damage, and is tried again.
        error = ProtocolError if what in HOSTILE else LinkError
        with pytest.raises(error) as caught:
            line.feed((HOSTILE | NOT_FRAMES)[what] + pages(0, 2, content(2)))
        assert str(caught.value).startswith("background lane 1: ")
        other.feed(pages(0, 3, content(3)))
        assert guest.received() == {1, 3}
        assert guest.destination.events().problem.args == ("",), "the event loop hears of it from the lane alone"
        assert (guest.read(1), guest.read(3)) == (content(1), content(3))


@both_paths
def test_an_unusual_page_size_does_not_overrun_the_lane(way: Populate) -> None:
    """Regions of 16 KiB pages take one page a frame; more is refused before a byte of it is read."""
    with Guest((256, 4 * PAGE), populate=way) as guest:
        line = guest.line()
        line.feed(pages(0, 1, content(1, size=4 * PAGE), 4 * PAGE))
        payload = b"".join(content(page, size=4 * PAGE) for page in range(2, 66))
        with pytest.raises(ProtocolError, match="64 pages"):
            line.feed(pages(0, 2, payload, 4 * PAGE))
        assert guest.received() == {1}


@pytest.mark.parametrize("what", NOT_FRAMES)
def test_without_checksums_other_protocols_are_recognised(what: str) -> None:
    with Guest() as guest, pytest.raises(ProtocolError, match="background lane 1: no frame begins with 0x"):
        guest.line(checksum=False).feed(NOT_FRAMES[what])


def drain(line: Line) -> None:
    """Until the lane ends, with an error."""
    while True:
        line.lane.receive(1000)


@both_paths
@pytest.mark.parametrize("end", [0, 1, 31, 32, 33, 32 + PAGE, 32 + 2 * PAGE - 1])
def test_a_frame_that_is_cut_off_is_not_installed(way: Populate, end: int) -> None:
    """The pages are still missing, and come by another lane."""
    with Guest(populate=way) as guest, watched(guest):
        line = guest.line(1)
        data = pages(0, 7, contents(7, 2))
        line.feed(data[:end])
        line.far.socket.close()
        text = "closed by the source in the middle of a frame" if end else "closed by the source$"
        with pytest.raises(LinkError, match=f"^background lane 1: {text}"):
            drain(line)
        assert guest.received() == set()
        guest.line(2).feed(data)
        assert guest.read(8) == content(8)


@both_paths
def test_garbage_is_an_error_of_the_peer(way: Populate, rng: random.Random) -> None:
    """Frames with bytes changed, left out and put in: each stream ends in one of two errors, and in nothing worse."""
    seen: dict[type[BaseException] | None, int] = {}
    with Guest(populate=way) as guest:
        for _ in range(200):
            data = bytearray(pages(0, 7, contents(7, 2)) + zeros(0, 1, 3) + beat())
            for _ in range(rng.randint(1, 3)):
                at, change = rng.randrange(len(data)), rng.choice([b"", b"", rng.randbytes(1), rng.randbytes(3)])
                at = rng.choice([at, at % 32])
                data[at : at + rng.randint(0, 2)] = change
            line = guest.line()
            problem: type[BaseException] | None = None
            try:
                line.feed(bytes(data))
                line.far.socket.close()
                drain(line)
            except GmemdError as error:
                problem = type(error)
            seen[problem] = seen.get(problem, 0) + 1
            line.close()
        assert set(seen) <= {ProtocolError, LinkError}
        for page in guest.received():
            assert guest.held(page) in (content(page), bytes(PAGE))


def test_a_lane_keeps_what_it_installs_into() -> None:
    """Invariant 8: the guest memory is not freed as long as a lane points to it, though nobody here remembers it."""
    with Guest() as guest:
        line = guest.line()
        memory = Memory("other", guest.memory.regions, guest.files, guest.uffds)
        memory.set_populate(0, Populate.COPY)
        line.lane = Lane(Destination(memory), 1, line.near.fileno(), checksum=True)
        del memory
        gc.collect()
        line.feed(pages(0, 7, content(7)))
        assert guest.held(7) == content(7)
        line.lane.close()


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@ways
def test_a_damaged_frame_is_asked_for_again_once(way: Populate) -> None:
    """Its pages come on the urgent lane; a second damaged frame on the lane ends it."""
    with Guest(populate=way) as guest, paged(guest) as far:
        line = guest.line()
        line.feed(flip(pages(0, 7, contents(7, 3)), 8 * (HEADER.size + PAGE + 5)), pages(0, 1, content(1)))
        assert guest.received() == {1}
        assert guest.counter("damaged_frames") == 1
        assert far.requested() == (0, 7, 3)
        far.send(pages(0, 7, contents(7, 3)))
        for page in (7, 8, 9):
            assert guest.read(page) == content(page)
        with pytest.raises(LinkError, match="damaged, and not the first"):
            line.feed(flip(pages(0, 20, content(20)), 8 * HEADER.size))
        assert 20 not in guest.received()


@both_paths
def test_a_damaged_frame_is_asked_for_by_the_next_urgent_lane(way: Populate) -> None:
    """With no urgent lane there is nobody to ask yet; that the pages are missing is not forgotten."""
    with Guest(populate=way) as guest, RunningPager() as pager, pager.serving(guest) as far:
        far.close()
        told(guest.destination, "urgent_down")
        guest.line().feed(flip(pages(0, 7, content(7)), 8 * HEADER.size))
        assert pager.serve(guest).requested() == (0, 7, 1)


@both_paths
def test_a_damaged_frame_is_asked_for_while_all_else_is_asked_for_again(way: Populate) -> None:
    with Guest(populate=way) as guest:
        pager, urgent = Pager(POLL_US), guest.line(0)
        pager.add(guest.destination)
        pager.set_urgent(guest.destination, urgent.lane)
        guest.line().feed(flip(pages(0, 4, contents(4, 4)), 8 * HEADER.size))
        pager.ask(guest.destination)
        running = Task(pager.run)
        try:
            assert urgent.far.requested() == (0, 4, 4)
        finally:
            pager.stop()
            running.result()
            pager.remove(guest.destination)


@both_paths
def test_a_damaged_header_ends_the_lane(way: Populate) -> None:
    """Where it says which pages came, nothing tells which they were: to ask for those would lose the true ones."""
    good = pages(0, 7, content(7))
    for bit in range(8 * HEADER.size):
        with Guest(populate=way) as guest:
            line = guest.line()
            with pytest.raises(LinkError, match="background lane 1: a damaged header"):
                line.feed(flip(good, bit))
            assert (guest.received(), guest.counter("damaged_frames")) == (set(), 0)


@ways
def test_no_flipped_bit_of_a_payload_gets_in(way: Populate, rng: random.Random) -> None:
    good = pages(0, 7, content(7))
    with Guest(populate=way) as guest, paged(guest) as far:
        for bit in rng.sample(range(8 * HEADER.size, 8 * len(good)), 100):
            line = guest.line()
            line.feed(flip(good, bit))
            assert (guest.received(), far.requested()) == (set(), (0, 7, 1))
            line.close()
        guest.line().feed(good)
        assert guest.read(7) == content(7)


def test_a_frame_without_its_checksum_is_not_taken() -> None:
    """Where checksums are agreed on, leaving one out is no way around them."""
    bare = Frame(kind=PAGES, region=0, first=7, count=1, length=PAGE).encode() + content(7)
    for way in Populate:
        with Guest(populate=way) as guest, watched(guest):
            with pytest.raises(LinkError, match="damaged header"):
                guest.line().feed(bare)
            assert guest.received() == set()
            guest.line(checksum=False).feed(bare)
            assert guest.read(7) == content(7)
