"""The source's side: requests are answered, the background sends each page once, and bad requests end the lane."""

import mmap
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest
from native_frames import BEAT, PAGES, REQUEST, ZERO, Frame, beat, request
from native_rig import HUGE, PAGE, PATIENCE, STATE_MESSAGES, Far, Task, content, huge_pages, new_file, tcp_pair, until

from gmemd.errors import HandoffError, LinkError, ProtocolError
from gmemd.native import check, lib
from gmemd.native.memory import Memory, Region
from gmemd.native.source import Push, PushState, Server, Source

if TYPE_CHECKING:
    from native_races import Races

pytest_plugins = ["native_races"]

BUDGET_US = 50_000
SO_MAX_PACING_RATE = 47
BATCH = 4096  # holes fetched a call
SILENCE = 0.1  # seconds; the kernel tells to within 10 ms when something last came


class Host:
    """Memory at a source: `shapes` are (pages, page size), the files begin with `offset` bytes of something else.
    `left`: the guest has."""

    def __init__(
        self, *shapes: tuple[int, int], offset: int = 0, files: Sequence[int] | None = None, left: bool = True
    ) -> None:
        self.shapes, self.offset = shapes or ((64, PAGE),), offset
        self._stack = ExitStack()
        self.files = list(files or [new_file(pages + offset // size, size) for pages, size in self.shapes])
        for fd in self.files:
            self._stack.callback(os.close, fd)
        regions = [
            Region(offset=offset, size=pages * size, page_size=size, gpa=i << 40, file=i)
            for i, (pages, size) in enumerate(self.shapes)
        ]
        self.memory = self._stack.enter_context(Memory("test", regions, self.files))
        self.source = Source(self.memory)
        if left:
            self.source.open()
        self._stack.callback(self.source.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def fill(self, *pages: int, region: int = 0) -> None:
        """Gives pages their content."""
        size = self.shapes[region][1]
        with mmap.mmap(self.files[region], 0, mmap.MAP_SHARED) as mapped:
            for page in pages:
                at = self.offset + page * size
                mapped[at : at + size] = content(page, region, size)

    def sockets(self, *, small: bool = False) -> tuple[Far, int]:
        """A connection: the peer's end, and ours as a descriptor. A small one holds some kilobytes."""
        far, near = socket.socketpair() if small else tcp_pair()
        if small:
            near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            near.setblocking(False)
            far.settimeout(PATIENCE)
        for end in (far, near):
            self._stack.callback(end.close)
        return Far(far), near.fileno()

    def push(self, lane: int = 1, *, small: bool = False) -> tuple[Push, Far]:
        far, near = self.sockets(small=small)
        push = Push(self.source, lane, near, checksum=True)
        self._stack.callback(push.close)
        return push, far

    @contextmanager
    def serving(self, *, small: bool = False, poll_us: int = 50) -> Iterator[tuple[Server, Far, Task[None]]]:
        """The urgent lane in its thread. It is stopped at the end, if it has not ended before."""
        far, near = self.sockets(small=small)
        server = Server(self.source, near, checksum=True, poll_us=poll_us)
        task = Task(server.run)
        try:
            yield server, far, task
        finally:
            server.stop()
            task.join()
            server.close()


def frames_of(far: Far, pages: int) -> list[tuple[int, int, int, bytes]]:
    """Frames until they have brought so many pages: kind, first page, pages, content."""
    found, seen = [], 0
    while seen < pages:
        frame, payload = far.frame_and_payload()
        if frame.kind != BEAT:
            found.append((frame.kind, frame.first, frame.count, payload))
            seen += frame.count
    return found


def push_all(push: Push) -> None:
    """Pushes to whoever reads at the other end."""
    while push.run(BUDGET_US) is not PushState.DONE:
        pass


def run(push: Push, far: Far) -> list[Frame]:
    """Pushes until all is sent, reading the frames meanwhile; their content is checked."""
    found: list[Frame] = []

    def read() -> None:
        while True:
            frame, payload = far.frame_and_payload()
            if frame.kind == BEAT:
                return
            for i in range(frame.count if frame.kind == PAGES else 0):
                page = payload[i * PAGE : (i + 1) * PAGE]
                assert page == content(frame.first + i, frame.region), f"page {frame.first + i}"
            found.append(frame)

    reader = Task(read)
    while push.run(BUDGET_US) is not PushState.DONE:
        pass
    while push.beat() is not PushState.DONE:
        pass
    reader.result()
    return found


# The urgent lane


def test_a_request_is_answered() -> None:
    with Host() as host, host.serving() as (_, far, _):
        host.fill(5)
        far.send(request(0, 5))
        assert frames_of(far, 1) == [(PAGES, 5, 1, content(5))]
        assert host.source.counters()["urgent_pages"] == 1


def test_no_page_is_sent_before_the_guest_has_left() -> None:
    """It could still change it. The second beat follows whatever an answer to the request would be."""
    with Host(left=False) as host, host.serving() as (server, far, _):
        host.fill(5)
        far.send(request(0, 5))
        until(far.all_sent)
        for _ in range(2):
            server.beat()
            assert far.frame().kind == BEAT
        host.source.open()
        far.send(request(0, 5))
        assert frames_of(far, 1) == [(PAGES, 5, 1, content(5))]


def test_an_answer_with_holes_between_the_data() -> None:
    """Runs of pages and runs of zeros, in order; a page of zeros that is no hole counts as zeros, too."""
    with Host() as host, host.serving() as (_, far, _):
        host.fill(0, 1, 4, 5, 6, 63)
        os.pwrite(host.files[0], bytes(PAGE), 8 * PAGE)
        far.send(request(0, 0, 64))
        assert [(kind, first, count) for kind, first, count, _ in frames_of(far, 64)] == [
            (PAGES, 0, 2),
            (ZERO, 2, 2),
            (PAGES, 4, 3),
            (ZERO, 7, 56),
            (PAGES, 63, 1),
        ]
        assert host.source.counters()["zero_pages"] == 58


def test_every_second_page_is_a_hole() -> None:
    """The answer with the most frames there can be."""
    with Host() as host, host.serving() as (_, far, _):
        host.fill(*range(0, 64, 2))
        far.send(request(0, 0, 64) * 3)
        found = frames_of(far, 3 * 64)
        assert len(found) == 3 * 64
        assert all(payload == content(first) for kind, first, _, payload in found if kind == PAGES)


def test_requests_come_in_pieces_and_in_crowds(rng: random.Random) -> None:
    with Host((512, PAGE), (4, 4 * PAGE)) as host, host.serving() as (_, far, _):
        host.fill(*range(512))
        host.fill(*range(4), region=1)
        asked = [(0, rng.randrange(512)) for _ in range(500)] + [(1, page) for page in range(4)]
        rng.shuffle(asked)
        data = b"".join(request(*what) for what in asked) + beat()

        def send() -> None:
            at = 0
            while at < len(data):
                cut = rng.choice([1, 7, 32, 33, 4096, 5000])
                far.send(data[at : at + cut])
                at += cut

        sender = Task(send)
        for region, page in asked:
            frame, payload = far.frame_and_payload()
            assert (frame.kind, frame.region, frame.first) == (PAGES, region, page)
            assert payload == content(page, region, host.shapes[region][1])
        sender.result()


def test_answers_wait_for_a_full_socket() -> None:
    """Many requests, and nobody reads for a while: nothing is lost, nothing is sent twice."""
    with Host((512, PAGE)) as host, host.serving(small=True) as (_, far, _):
        host.fill(*range(512))
        sender = Task(far.send, b"".join(request(0, page) for page in range(512)))
        for page in range(512):
            assert frames_of(far, 1) == [(PAGES, page, 1, content(page))]
        sender.result()


GOOD = Frame(kind=REQUEST, region=0, first=3, count=1)
BAD = {
    "magic": (replace(GOOD, magic=0), "no frame begins with 0x0000"),
    "kind": (replace(GOOD, kind=ZERO), "kind 3"),
    "region": (replace(GOOD, region=2), "region 2 of 2"),
    "page": (replace(GOOD, first=64), "page 64 outside region 0"),
    "last page": (replace(GOOD, first=60, count=5), "page 64 outside region 0"),
    "wrapped around": (replace(GOOD, first=2**64 - 1, count=2), f"page {2**64 - 1} outside region 0"),
    "no pages": (replace(GOOD, count=0), "0 pages"),
    "too many pages": (replace(GOOD, first=0, count=65), "65 pages"),
    "too many large pages": (replace(GOOD, region=1, first=0, count=2), "2 pages"),
    "content": (replace(GOOD, length=PAGE), "4096 bytes"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_request_ends_the_lane(what: str) -> None:
    """The destination is named, nothing is sent for it, and what was asked before is answered."""
    frame, text = BAD[what]
    with Host((64, PAGE), (4, 4 * PAGE)) as host, host.serving() as (_, far, task):
        host.fill(1)
        far.send(request(0, 1))
        assert frames_of(far, 1) == [(PAGES, 1, 1, content(1))]
        far.send(frame.sealed().encode() + request(0, 1))
        with pytest.raises(ProtocolError, match=f"^urgent lane: .*{text}.*: sent by the destination$"):
            task.result()
        assert host.source.counters()["urgent_pages"] == 1


def test_a_damaged_request_is_the_links_fault() -> None:
    with Host() as host, host.serving() as (_, far, task):
        far.send(replace(GOOD.sealed(), first=4).encode())
        with pytest.raises(LinkError, match="a damaged header"):
            task.result()


def test_a_destination_that_leaves_ends_the_lane() -> None:
    with Host() as host, host.serving() as (_, far, task):
        far.send(request(0, 1)[:20])
        far.close()
        with pytest.raises(LinkError, match=r"^urgent lane: closed by the destination$"):
            task.result()


def test_a_destination_that_leaves_while_the_socket_is_full() -> None:
    with Host((512, PAGE)) as host, host.serving(small=True) as (_, far, task):
        host.fill(*range(512))
        far.send(b"".join(request(0, page) for page in range(100)))
        frames_of(far, 1)
        far.close()
        with pytest.raises(LinkError, match="urgent lane"):
            task.result()


@pytest.mark.parametrize("mapped", [False, True])
def test_a_truncated_file_names_the_pages(mapped: bool) -> None:
    """The VMM took its memory away: an error on the urgent lane and on the background ones, and no SIGBUS."""
    with Host() as host:
        host.fill(*range(64))
        if mapped:
            check(lib.gm_memory_map, host.memory.native, 0)
        os.truncate(host.files[0], 40 * PAGE)
        with host.serving() as (_, far, task):
            far.send(request(0, 38, 4))
            with pytest.raises(HandoffError, match="region 0: pages 38 to 41 cannot be read"):
                task.result()
        push, _ = host.push()
        host.source.restart()
        with pytest.raises(HandoffError, match="region 0: pages 0 to 63 cannot be read"):
            push.run(BUDGET_US)


def test_beats_of_the_server() -> None:
    """Sent when told to, also while it sleeps; the destination's are heard."""
    with Host() as host, host.serving(poll_us=0) as (server, far, _):
        server.beat()
        assert far.frame().kind == BEAT
        before = server.heard_ns
        far.send(beat())
        until(lambda: server.heard_ns > before)


def test_beats_are_heard_while_the_socket_is_full() -> None:
    """No request is read then: a destination whose line is slow is alive all the same."""
    with Host((4096, PAGE)) as host, host.serving() as (server, far, _):
        host.fill(*range(4096))
        far.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        far.send(b"".join(request(0, page, 64) for page in range(0, 4096, 64)))
        until(lambda: host.source.counters()["sent_bytes"] > 0)
        time.sleep(SILENCE)
        before = server.heard_ns
        time.sleep(SILENCE)
        far.send(beat())
        until(lambda: server.heard_ns > before + SILENCE * 1e9 / 2)
        frames_of(far, 4096)


def test_an_idle_server_uses_no_cpu() -> None:
    with Host() as host, host.serving(poll_us=100) as (_, far, task):
        host.fill(*range(10))
        for page in range(10):
            far.send(request(0, page))
            frames_of(far, 1)
        schedstat = Path(f"/proc/self/task/{task.native_id}/schedstat")
        time.sleep(0.05)
        before = int(schedstat.read_text().split()[0])
        time.sleep(0.3)
        assert int(schedstat.read_text().split()[0]) - before < 2_000_000


# The background lanes


def test_the_background_sends_every_page_once(rng: random.Random) -> None:
    """Three lanes and the urgent one at once, two regions: the background leaves out nothing, and repeats nothing."""
    count = 4096
    with Host((count, PAGE), (100, PAGE)) as host, host.serving() as (_, urgent, _):
        filled = {page for page in range(count) if page % 7}
        host.fill(*filled)
        host.fill(*range(100), region=1)
        asked = rng.sample(range(count), 400)
        requests = Task(urgent.send, b"".join(request(0, page) for page in asked))
        lanes = [Task(run, *host.push(lane)) for lane in (1, 2, 3)]
        answers = {first for _, first, _, _ in frames_of(urgent, len(asked))}
        requests.result()
        found = [frame for lane in lanes for frame in lane.result()]
        sent = Counter((f.region, page) for f in found for page in range(f.first, f.first + f.count))
        zero = {page for f in found if not f.region and f.kind == ZERO for page in range(f.first, f.first + f.count)}
        assert set(sent.values()) == {1}, "none twice"
        assert {page for region, page in sent if region == 0} | answers == set(range(count)), "none lost"
        assert {page for region, page in sent if region == 1} == set(range(100))
        assert zero == {page for region, page in sent if region == 0} - filled
        assert host.source.counters()["background_pages"] == len(sent)


def test_a_page_taken_from_the_middle_of_a_frame_costs_no_other(races: "Races") -> None:
    """The urgent lane takes it just while the background takes those around it: these go all the same, each once."""
    count = 1 << 17
    with Host((count, PAGE)) as host:
        state_size = os.fstat(host.memory.state_fd).st_size
        with mmap.mmap(host.memory.state_fd, state_size, mmap.MAP_SHARED) as state:
            at = state_size - STATE_MESSAGES - 2 * count // 8  # two bitmaps, this one first
            state[at : at + count // 8] = bytes([0b11100011]) * (count // 8)
        times = races.source(host.source)
        assert set(times[2::8]) == set(times[4::8]) == {1}
        assert not any(times[i::8].strip(b"\0") for i in (0, 1, 5, 6, 7))


def test_a_full_socket_is_said_and_made_up_for() -> None:
    """FULL, with a frame half sent; once there is room it goes on where it was."""
    with Host((512, PAGE)) as host:
        host.fill(*range(512))
        push, far = host.push(small=True)
        assert push.run(BUDGET_US) is PushState.FULL
        assert push.run(BUDGET_US) is PushState.FULL
        assert push.beat() is PushState.FULL, "a beat does not go into the middle of a frame"
        pages = {page for f in run(push, far) for page in range(f.first, f.first + f.count)}
        assert pages == set(range(512))


def test_a_budget_ends_a_push() -> None:
    with Host((2048, PAGE)) as host:
        push, far = host.push()
        assert push.run(1) is PushState.BUSY
        assert sum(f.count for f in run(push, far)) == 2048


def test_a_rate_is_kept() -> None:
    """Less than it would be otherwise, and never in a burst: some frames, then a pause until their time has passed."""
    rate = 20 << 20
    with Host((1024, PAGE)) as host:
        push, far = host.push()
        host.source.set_rate(rate)
        began, states = time.monotonic(), Counter[PushState]()
        reader = Task(frames_of, far, 1024)
        while (state := push.run(BUDGET_US)) is not PushState.DONE:
            states[state] += 1
            time.sleep(host.source.pause)
        reader.result()
        assert states[PushState.EARLY] > 5
        assert time.monotonic() - began > 0.9 * 1024 * PAGE / rate
        host.source.set_rate(0)
        assert host.source.pause == 0


def ask_until(host: Host, urgent: Far, true: Callable[[], bool], waited_us: int) -> None:
    """Asks for a page again and again, saying how long each was waited for."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, f"the lane's rate is {host.source.lane_rate}"
        urgent.send(request(0, 0, waited_us=waited_us))
        urgent.frame_and_payload()


def queue(host: Host, us: int) -> None:
    """As if that was what a background lane has seen."""
    lib.gm_source_note_queue(host.source.native, us)


def test_the_background_gives_way_to_long_waits() -> None:
    """Slower while pages are waited for long, never at a stand; faster again when they are not; off on request."""
    with Host() as host, host.serving() as (_, urgent, _):
        host.fill(0)
        lanes = [host.push(lane) for lane in (1, 2)]
        assert host.source.lane_rate == 0
        queue(host, 5000)
        ask_until(host, urgent, lambda: host.source.lane_rate > 0, 50_000)
        held = host.source.lane_rate
        assert held * len(lanes) >= 8 << 20
        host.source.set_giveway(False)
        assert host.source.lane_rate == 0
        host.source.set_giveway(True)
        ask_until(host, urgent, lambda: host.source.lane_rate > 4 * held, 1)


def test_only_a_queue_holds_the_background_back() -> None:
    """Long waits with nothing in the way are a busy host's, and nobody is helped by a slower background."""
    with Host() as host, host.serving() as (_, urgent, _):
        host.fill(0)
        queue(host, 5000)
        ask_until(host, urgent, lambda: host.source.lane_rate > 0, 50_000)
        queue(host, 0)
        ask_until(host, urgent, lambda: host.source.lane_rate == 0, 50_000)


def test_who_waits_for_nothing_holds_nothing_back() -> None:
    """The kernel spaces what a lane sends as long as somebody waits, and no longer."""
    with Host() as host, host.serving() as (_, urgent, _):
        host.fill(0)
        far, near = tcp_pair()
        push = Push(host.source, 1, near.fileno(), checksum=True)
        queue(host, 5000)
        ask_until(host, urgent, lambda: host.source.lane_rate > 0, 50_000)
        push.run(1)
        assert near.getsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE) > 0
        until(lambda: host.source.lane_rate == 0)
        push.run(1)
        assert near.getsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE) == -1, "no limit"
        push.close()
        near.close()
        far.close()


def test_a_push_beats() -> None:
    with Host() as host:
        push, far = host.push()
        assert push.beat() is PushState.DONE
        assert far.frame().kind == BEAT
        assert sum(f.count for f in run(push, far)) == 64
        assert push.beat() is PushState.DONE
        assert far.frame().kind == BEAT


def test_a_push_without_its_destination_is_a_broken_link() -> None:
    with Host((512, PAGE)) as host:
        host.fill(*range(512))
        push, far = host.push(small=True)
        far.close()
        with pytest.raises(LinkError, match="background lane 1"):
            push.run(BUDGET_US)


def test_beginning_anew_without_what_is_there() -> None:
    """After a recovery: everything again, but for what the destination has."""
    with Host((200, PAGE)) as host:
        push, far = host.push()
        assert sum(f.count for f in run(push, far)) == 200
        host.source.restart()
        host.source.skip(0, 10, 100)
        host.source.skip(0, 130, 1)
        sent = [page for f in run(push, far) for page in range(f.first, f.first + f.count)]
        assert sorted(sent) == [*range(10), *range(110, 130), *range(131, 200)]


# Holes


def test_what_a_file_has_lost_is_no_hole() -> None:
    """A file that was cut short behind our back: what it had is gone, and the guest must not take zeros for it."""
    with Host() as host:
        host.fill(*range(10, 20), *range(60, 64))
        os.truncate(host.files[0], 40 * PAGE)
        assert holes(host) == [(0, 10)]
        push, _ = host.push()
        with pytest.raises(HandoffError, match="region 0: pages 10 to 63 cannot be read"):
            push.run(BUDGET_US)


def holes(host: Host, region: int = 0) -> list[tuple[int, int]]:
    return [hole for batch in host.source.holes(region) for hole in batch]


@pytest.mark.parametrize("offset", [0, 16 * PAGE])
def test_holes_are_told_and_not_sent(rng: random.Random, offset: int) -> None:
    """Each run of pages without data once, whatever is in the file before the region."""
    for filled in (set(), {0}, {299}, {0, 299}, set(range(300)), set(rng.sample(range(300), 60))):
        with Host((300, PAGE), offset=offset) as host:
            os.pwrite(host.files[0], b"x" * offset, 0)
            host.fill(*filled)
            found = holes(host)
            told = [page for first, count in found for page in range(first, first + count)]
            assert sorted(told) == sorted(set(range(300)) - filled)
            assert all(a + b < c for (a, b), (c, _) in pairwise(found)), "runs, not pieces"
            push, far = host.push()
            sent = [page for f in run(push, far) for page in range(f.first, f.first + f.count)]
            assert sorted(sent) == sorted(filled)


def test_more_holes_than_are_fetched_at_once() -> None:
    count = 2 * (2 * BATCH + 10)
    with Host((count, PAGE)) as host:
        for page in range(0, count, 2):
            os.pwrite(host.files[0], b"x", page * PAGE)
        assert holes(host) == [(page, 1) for page in range(1, count, 2)]


def test_a_large_page_with_some_data_is_no_hole(tmp_path: Path) -> None:
    """A file of 4 KiB pages that stands for 2 MiB ones: a page is a hole only if nothing of it is there."""
    path = tmp_path / "image"
    with path.open("w+b") as file:
        os.truncate(file.fileno(), 8 * HUGE)
        os.pwrite(file.fileno(), b"x", 2 * HUGE - 1)
        os.pwrite(file.fileno(), b"x", 5 * HUGE + 7 * PAGE)
        with Host((8, HUGE), files=[os.dup(file.fileno())]) as host:
            assert holes(host) == [(0, 1), (2, 3), (6, 2)]
            push, far = host.push()
            pushing = Task(push_all, push)
            assert [(kind, first) for kind, first, _, _ in frames_of(far, 2)] == [(PAGES, 1), (PAGES, 5)]
            pushing.result()


def test_holes_of_huge_pages_are_found_when_sent() -> None:
    """hugetlbfs calls everything data: nothing is told up front, and absent pages go as zeros all the same."""
    with huge_pages(4), Host((4, HUGE)) as host:
        host.fill(1, 3)
        assert holes(host) == []
        push, far = host.push()
        pushing = Task(push_all, push)
        assert frames_of(far, 4) == [
            (ZERO, 0, 1, b""),
            (PAGES, 1, 1, content(1, size=HUGE)),
            (ZERO, 2, 1, b""),
            (PAGES, 3, 1, content(3, size=HUGE)),
        ]
        pushing.result()
