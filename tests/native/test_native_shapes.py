"""Whole guests of every shape, from a source's file to what the guest reads: urgent and background lanes at once."""

import mmap
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest
from native_rig import HUGE, PAGE, POLL_US, Guest, RunningPager, Task, content, huge_pages, new_file, tcp_pair, until

from gmemd.native.destination import Lane
from gmemd.native.memory import Memory, Populate, Region
from gmemd.native.source import Push, PushState, Server, Source

ways = pytest.mark.parametrize("way", list(Populate))

BUDGET_US = 20_000


@contextmanager
def source_of(shapes: Sequence[tuple[int, int]], zero_every: int) -> Iterator[Source]:
    """A source whose pages have content, but for every so many, which are holes."""
    with ExitStack() as stack:
        files = [new_file(*shape) for shape in shapes]
        for region, ((pages, size), fd) in enumerate(zip(shapes, files, strict=True)):
            stack.callback(os.close, fd)
            with mmap.mmap(fd, pages * size, mmap.MAP_SHARED) as mapped:
                for page in range(pages):
                    if (page + region) % zero_every:
                        mapped[page * size : (page + 1) * size] = content(page, region, size)
        regions = [
            Region(offset=0, size=pages * size, page_size=size, gpa=i << 40, file=i)
            for i, (pages, size) in enumerate(shapes)
        ]
        memory = stack.enter_context(Memory("test", regions, files))
        source = Source(memory)
        source.open()
        stack.callback(source.close)
        yield source


def push_all(source: Source, lane: int, fd: int) -> None:
    push = Push(source, lane, fd, checksum=True)
    while push.run(BUDGET_US) is not PushState.DONE:
        pass
    push.close()


def receive_all(guest: Guest, lane: int, fd: int) -> None:
    receiving = Lane(guest.destination, lane, fd, checksum=True)
    while guest.memory.received < guest.memory.pages:
        receiving.receive(BUDGET_US)
    receiving.close()


def read_some(guest: Guest, zero_every: int, seed: float, part: float) -> None:
    own = random.Random(seed)
    everything = [(region, page) for region, (pages, _) in enumerate(guest.shapes) for page in range(pages)]
    for region, page in own.sample(everything, int(part * len(everything)) or 1):
        size = guest.shapes[region][1]
        expected = content(page, region, size) if (page + region) % zero_every else bytes(size)
        assert guest.read(page, region) == expected, f"region {region}, page {page}"


@contextmanager
def connected() -> Iterator[tuple[int, int]]:
    """The two ends of a lane, ours first."""
    ends = tcp_pair()
    with ends[0], ends[1]:
        for end in ends:
            end.setblocking(False)
        yield ends[0].fileno(), ends[1].fileno()


@contextmanager
def faults_answered(guest: Guest, source: Source) -> Iterator[None]:
    """By a pager and the source's server, each in its thread."""
    with RunningPager() as running, connected() as (near, far):
        lane = Lane(guest.destination, 0, near, checksum=True)
        server = Server(source, far, checksum=True, poll_us=POLL_US)
        serving = Task(server.run)
        running.pager.add(guest.destination)
        running.pager.set_urgent(guest.destination, lane)
        try:
            yield
        finally:
            running.pager.remove(guest.destination)
            server.stop()
            serving.join()
            lane.close()
            server.close()
        serving.result()


def migrate(guest: Guest, rng: random.Random, *, lanes: int = 2, zero_every: int = 5) -> None:
    """The whole guest moves while threads read it; in the end everything is read once more."""
    with source_of(guest.shapes, zero_every) as source, faults_answered(guest, source), ExitStack() as stack:
        tasks = [Task(read_some, guest, zero_every, rng.random(), 0.3) for _ in range(3)]
        for first, count in (hole for batch in source.holes(0) for hole in batch):
            guest.destination.told_zero(0, first, count)
        for lane in range(1, lanes + 1):
            near, far = stack.enter_context(connected())
            tasks += [Task(push_all, source, lane, far), Task(receive_all, guest, lane, near)]
        for task in tasks:
            task.result()
        assert guest.destination.events().complete
        read_some(guest, zero_every, 0, 1)
        until(lambda: guest.counter("waits") == 0)
    counters = guest.destination.counters()
    installed = counters["urgent_pages"] + counters["background_pages"] + counters["zero_pages"]
    assert installed == guest.memory.pages
    assert counters["damaged_frames"] == 0


@ways
def test_small_pages(way: Populate, rng: random.Random) -> None:
    with Guest((3000, PAGE), populate=way) as guest:
        migrate(guest, rng, lanes=3)


@pytest.mark.parametrize("way", [Populate.COPY, Populate.RECV])
def test_huge_pages_beside_small_ones(way: Populate, rng: random.Random) -> None:
    """A guest with regions of both, in one migration: one page is one page, whatever its size."""
    with huge_pages(12), Guest((300, PAGE), (5, HUGE), (1, PAGE), (1, HUGE), populate=way) as guest:
        migrate(guest, rng)


def test_each_region_its_own_way(rng: random.Random) -> None:
    with huge_pages(8), Guest((500, PAGE), (4, HUGE), (500, PAGE), populate=Populate.WRITE, register=False) as guest:
        guest.memory.set_populate(1, Populate.RECV)
        guest.memory.set_populate(2, Populate.COPY)
        guest.memory.register()
        migrate(guest, rng)


@ways
@pytest.mark.parametrize("uffd_each", [False, True])
def test_64_regions_of_odd_sizes(way: Populate, uffd_each: bool, rng: random.Random) -> None:
    """From one page to some hundred, each in a file of its own; borders of words and of frames on every side."""
    sizes = [1, 2, 63, 64, 65, 127, 128, 129] + [rng.randrange(1, 200) for _ in range(56)]
    rng.shuffle(sizes)
    with Guest(*((size, PAGE) for size in sizes), populate=way, uffd_each=uffd_each) as guest:
        migrate(guest, rng)


def test_no_background_lane(rng: random.Random) -> None:
    """Everything by faults alone."""
    with Guest((400, PAGE)) as guest, source_of(guest.shapes, 5) as source:
        with faults_answered(guest, source):
            readers = [Task(read_some, guest, 5, rng.random(), 1) for _ in range(4)]
            for reader in readers:
                reader.result()
        assert guest.destination.events().complete
        assert guest.counter("background_pages") == 0
