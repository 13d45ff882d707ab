"""The pager: each page asked for once, nobody forgotten, and no CPU used when nothing is to do."""

import errno
import gc
import os
import resource
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from native_frames import BEAT, REQUEST, pages, zeros
from native_rig import (
    FEATURE_REMOVE,
    FEATURE_THREAD_ID,
    PAGE,
    Far,
    Guest,
    RunningPager,
    Task,
    content,
    paged,
    told,
    until,
)

from gmemd.errors import HandoffError, KernelError, LinkError, ProtocolError
from gmemd.native import ffi, lib
from gmemd.native.destination import Destination, Lane
from gmemd.native.memory import Memory, Populate, Region

IDLE_SECONDS = 0.5
RECORD = struct.Struct("<QQIHH")  # time, page, thread, region, flags


def answer(far: Far, count: int) -> list[int]:
    """Answers so many requests in the order in which they come; returns their pages."""
    asked = []
    for _ in range(count):
        region, first, number = far.requested()
        assert number == 1
        asked.append(first)
        far.send(pages(region, first, content(first, region)))
    return asked


def test_threads_on_one_page_ask_once() -> None:
    """One request for all of them; all of them go on."""
    with Guest() as guest, paged(guest) as far:
        readers = [Task(guest.read, 9) for _ in range(20)]
        until(lambda: guest.counter("waits") == 20)
        assert far.requested() == (0, 9, 1)
        other = Task(guest.read, 10)
        assert far.requested() == (0, 10, 1), "the next request is for another page"
        far.send(pages(0, 9, content(9)) + pages(0, 10, content(10)))
        assert {reader.result() for reader in readers} == {content(9)}
        assert other.result() == content(10)
        assert guest.counter("requests") == 2
        assert guest.counter("faults") == 21


def test_who_waits_is_told() -> None:
    """Page, thread and how long, longest first; the latency is recorded when the wait ends."""
    with Guest((8, PAGE), (8, PAGE), features=FEATURE_THREAD_ID) as guest, paged(guest) as far:
        before = time.monotonic_ns()
        first = Task(guest.read, 3, 1)
        far.requested()
        second = Task(guest.read, 5)
        far.requested()
        waits = guest.destination.waits()
        assert [(wait.region, wait.page, wait.thread) for wait in waits] == [
            (1, 3, first.native_id),
            (0, 5, second.native_id),
        ]
        assert before < waits[0].since_ns < waits[1].since_ns < time.monotonic_ns()
        far.send(pages(1, 3, content(3, 1)) + pages(0, 5, content(5)))
        first.result()
        second.result()
        until(lambda: guest.destination.waits() == [])
        waited = (time.monotonic_ns() - before) / 1000
        assert 0 < guest.destination.latency_us()["p50"] <= guest.destination.latency_us()["max"] < waited


def test_a_page_that_arrives_in_the_background_answers_its_fault() -> None:
    with Guest() as guest, paged(guest) as far:
        reader = Task(guest.read, 9)
        far.requested()
        guest.line().feed(pages(0, 8, content(8) + content(9)))
        assert reader.result() == content(9)


def test_answers_that_come_all_at_once_are_all_dealt_with() -> None:
    """More than the pager takes in one turn, and no byte after them that would wake it for what it has read ahead."""
    count = 100
    with Guest((count, PAGE)) as guest, paged(guest) as far:
        readers = [Task(guest.read, page) for page in range(count)]
        asked = [far.requested()[1] for _ in readers]
        far.send(b"".join(pages(0, page, content(page)) for page in asked))
        for page, reader in enumerate(readers):
            assert reader.result() == content(page)


def test_a_new_urgent_lane_asks_for_everything_that_is_waited_for() -> None:
    """What the old one was asked, and what came while there was none."""
    with Guest() as guest, RunningPager() as running, running.serving(guest) as far:
        readers = [Task(guest.read, page) for page in range(10)]
        assert sorted(far.requested()[1] for _ in readers) == list(range(10))
        guest.line().feed(pages(0, 0, content(0)))
        far.close()
        told(guest.destination, "urgent_down")
        more = [Task(guest.read, page) for page in range(20, 24)]
        until(lambda: guest.counter("waits") == 9 + 4)
        again = running.serve(guest)
        assert sorted(answer(again, 9 + 4)) == [*range(1, 10), *range(20, 24)]
        for page, reader in enumerate(readers):
            assert reader.result() == content(page)
        for page, reader in enumerate(more, 20):
            assert reader.result() == content(page)


def test_an_urgent_lane_is_replaced_while_it_works() -> None:
    with Guest() as guest, RunningPager() as running, running.serving(guest) as old:
        reader = Task(guest.read, 1)
        old.requested()
        new = running.serve(guest)
        assert answer(new, 1) == [1]
        assert reader.result() == content(1)
        assert not guest.destination.events().urgent_down, "a lane that was replaced did not fail"


@pytest.mark.parametrize("how", ["closed", "hostile", "taken away"])
def test_an_urgent_lane_that_ends_is_told(how: str) -> None:
    """The event loop hears why; faults go on being read."""
    with Guest() as guest, RunningPager() as running, running.serving(guest) as far:
        if how == "closed":
            far.close()
        elif how == "hostile":
            far.send(zeros(7, 0, 1))
        else:
            running.pager.set_urgent(guest.destination, None)
        if how != "taken away":
            problem = told(guest.destination, "urgent_down")
            assert isinstance(problem, LinkError if how == "closed" else ProtocolError)
            assert str(problem).startswith("urgent lane: ")
        reader = Task(guest.read, 4)
        until(lambda: guest.counter("waits") == 1)
        assert guest.counter("faults") == 1
        answer(running.serve(guest), 1)
        reader.result()


@pytest.fixture
def many_files() -> Iterator[None]:
    """Room for two files a reader, which is more than is usual."""
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(usual[0], min(usual[1], 4096)), usual[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, usual)


@pytest.mark.usefixtures("many_files")
def test_more_threads_than_there_is_room_for() -> None:
    """Beyond 1024 waits the messages stay in the kernel, and are read once there is room: all are answered."""
    count = lib.GM_MAX_WAITS + 60
    with Guest((count, PAGE)) as guest, paged(guest) as far:
        readers = [Task(guest.read, page) for page in range(count)]
        until(lambda: guest.unread_faults() == count - lib.GM_MAX_WAITS)
        assert guest.counter("waits") == lib.GM_MAX_WAITS
        assert len(set(answer(far, count))) == count
        for page, reader in enumerate(readers):
            assert reader.result() == content(page)
        assert guest.counter("requests") == count


@pytest.mark.usefixtures("many_files")
def test_a_removal_behind_more_faults_than_there_is_room_for() -> None:
    """An event that is not read holds up every CONTINUE, and faults that find no room lie before it: no deadlock."""
    count = lib.GM_MAX_WAITS + 60
    with Guest((count + 1, PAGE), features=FEATURE_REMOVE) as guest, paged(guest) as far:
        readers = [Task(guest.read, page) for page in range(count)]
        first = [far.requested()[1] for _ in range(lib.GM_MAX_WAITS)]
        balloon = Task(guest.remove, count)
        until(lambda: held_up(guest, count))
        far.send(b"".join(pages(0, page, content(page)) for page in first))
        balloon.result()
        rest = set(range(count)) - set(first)
        while rest:
            rest -= set(answer(far, 1))
        for page, reader in enumerate(readers):
            assert reader.result() == content(page)


def held_up(guest: Guest, page: int) -> bool:
    """Whether an event waits to be read."""
    done = ffi.new("uint64_t *")
    return bool(lib.gm_uffd_continue(guest.uffds[0], guest.hva(page), PAGE, PAGE, done) == -errno.EAGAIN)


def test_a_page_that_could_not_be_mapped_for_an_event_is_mapped_after_it() -> None:
    """EAGAIN: received, and not mapped, until the event is read; whoever waits for the page goes on then."""
    with Guest(features=FEATURE_REMOVE) as guest, RunningPager() as running:
        with running.serving(guest) as far:
            readers = [Task(guest.read, page) for page in range(8)]
            for _ in readers:
                far.requested()
        balloon = Task(guest.remove, 40)
        until(lambda: held_up(guest, 41))
        guest.line().feed(pages(0, 0, b"".join(content(page) for page in range(8))))
        assert guest.received() == set(range(8))
        assert all(reader.is_alive() for reader in readers)
        with running.serving(guest):
            balloon.result()
            for page, reader in enumerate(readers):
                assert reader.result() == content(page)


def test_requests_that_find_no_room_are_made_up_for() -> None:
    """A source that does not read for a while, and more faults than the queue holds: who still waits is asked for."""
    count = 3000
    with Guest((count, PAGE)) as guest, RunningPager() as running, running.serving(guest):
        line = guest.line(0)
        line.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        line.far.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        running.pager.set_urgent(guest.destination, line.lane)
        background = guest.line(1)
        at = 0
        while at < count - 200:  # faults whose pages come in the background: their requests are queued all the same
            readers = [Task(guest.read, page) for page in range(at, at + 200)]
            until(lambda: guest.counter("waits") == 200)
            background.feed(*(pages(0, page, content(page)) for page in range(at, at + 200)))
            for reader in readers:
                reader.result()
            at += 200
        readers = [Task(guest.read, page) for page in range(at, count)]
        until(lambda: guest.counter("waits") == count - at)
        wanted = set(range(at, count))
        while wanted:
            _, page, _ = line.far.requested()
            if page in wanted:
                line.far.send(pages(0, page, content(page)))
            wanted.discard(page)
        for page, reader in enumerate(readers, at):
            assert reader.result() == content(page)


def test_pages_that_could_not_be_put_in_place_are_asked_for_once_more() -> None:
    """After a failure nothing happens by itself; `ask` makes up for it."""
    with Guest(populate=Populate.COPY) as guest, RunningPager() as running, running.serving(guest) as far:
        reader = Task(guest.read, 9)
        far.requested()
        os.truncate(guest.files[0], 4 * PAGE)
        far.send(pages(0, 9, content(9)))
        told(guest.destination, "stuck")
        os.truncate(guest.files[0], 64 * PAGE)
        running.pager.ask(guest.destination)
        answer(far, 1)
        assert reader.result() == content(9)


def test_beats_are_sent_and_heard() -> None:
    with Guest() as guest, RunningPager() as running:
        running.pager.beat(guest.destination)  # unknown to the pager, or without a lane: nothing happens
        with running.serving(guest) as far:
            running.pager.beat(guest.destination)
            assert far.frame().kind == BEAT
            reader = Task(guest.read, 1)
            assert far.frame().kind == REQUEST
            far.send(pages(0, 1, content(1)))
            reader.result()


class Mistaken(Guest):
    """Its VMM has mixed up two memory files: what is put in place never shows where it is waited for."""

    def new_memory(self, regions: list[Region]) -> Memory:
        return Memory("test", regions, self.files[::-1], self.uffds)


def test_a_page_that_does_not_show_where_it_is_waited_for() -> None:
    """That is said, and costs nothing: the pager does not try for ever."""
    with Mistaken((8, PAGE), (8, PAGE)) as guest, RunningPager() as running, running.serving(guest) as far:
        Task(guest.read, 5)
        assert far.requested() == (0, 5, 1)
        far.send(pages(0, 5, content(5)))
        problem = told(guest.destination, "stuck")
        assert isinstance(problem, HandoffError)
        assert str(problem) == "region 0: page 5 is in place and cannot be mapped: Bad address"
        assert [wait.page for wait in guest.destination.waits()] == [5]
        before = running.pager.turns
        time.sleep(0.1)
        assert running.pager.turns - before < 10


def test_a_lane_for_a_migration_that_the_pager_does_not_know() -> None:
    with Guest() as guest, RunningPager() as running, pytest.raises(KernelError, match="does not know"):
        running.pager.set_urgent(guest.destination, guest.line(0).lane)


def test_migrations_share_a_pager() -> None:
    """Each page goes to its own guest, and an end of one is nothing to the others."""
    with RunningPager() as running, ExitStack() as stack:
        guests = [stack.enter_context(Guest((256, PAGE))) for _ in range(4)]
        fars = [stack.enter_context(running.serving(guest)) for guest in guests]

        def serve(far: Far, version: int) -> None:
            for _ in range(128):
                _, page, _ = far.requested()
                far.send(pages(0, page, content(page, version=version)))

        def read(number: int) -> None:
            for page in range(0, 256, 2):
                assert guests[number].read(page) == content(page, version=number)

        servers = [Task(serve, far, i) for i, far in enumerate(fars)]
        readers = [Task(read, i) for i in range(4)]
        for task in [*readers, *servers]:
            task.result()
        fars[1].close()
        told(guests[1].destination, "urgent_down")
        reader = Task(guests[2].read, 1)
        answer(fars[2], 1)
        assert reader.result() == content(1)


def test_migrations_come_and_go_under_load() -> None:
    """Added and removed while another one faults as fast as it can."""
    with RunningPager() as running, Guest((4096, PAGE)) as busy, running.serving(busy) as far:
        stop = False

        def serve() -> None:
            while (asked := far.frame()).kind == REQUEST:
                far.send(pages(0, asked.first, content(asked.first)))

        def read(start: int) -> int:
            page = start
            while not stop and page < 4096:
                assert busy.read(page) == content(page)
                page += 2
            return page - start

        server = Task(serve)
        readers = [Task(read, start) for start in (0, 1)]
        for round_ in range(40):
            with Guest((16, PAGE)) as guest, running.serving(guest) as its:
                reader = Task(guest.read, 3)
                answer(its, 1)
                assert reader.result() == content(3), f"round {round_}"
        stop = True
        assert min(reader.result() for reader in readers) > 0
        running.pager.beat(busy.destination)
        server.result()


def test_a_removed_migration_is_not_read_any_more() -> None:
    """Its faults stay in the kernel, for whoever adds it again."""
    with Guest() as guest, RunningPager() as running:
        with running.serving(guest):
            pass
        reader = Task(guest.read, 2)
        until(lambda: guest.unread_faults() == 1)
        assert guest.counter("faults") == 0
        with running.serving(guest) as far:
            answer(far, 1)
            assert reader.result() == content(2)


def test_several_userfaultfds_of_a_migration() -> None:
    with Guest(*[(4, PAGE)] * 12, uffd_each=True) as guest, paged(guest) as far:
        readers = [Task(guest.read, 2, region) for region in range(12)]
        answer(far, 12)
        for region, reader in enumerate(readers):
            assert reader.result() == content(2, region)


def test_faults_are_traced() -> None:
    """Each with its page, its thread, and what kind it was; in the order in which they were read."""
    with Guest((8, PAGE), (8, PAGE), features=FEATURE_THREAD_ID, trace=True) as guest, paged(guest) as far:
        os.pwrite(guest.files[1], bytes(PAGE), 6 * PAGE)
        began = time.monotonic_ns()
        tasks = []
        for work in ((guest.read, 5, 0), (guest.read, 6, 1), (guest.write, 7, b"x", 1)):
            tasks.append(Task(*work))
            region, page, _ = far.requested()
            far.send(pages(region, page, content(page, region)))
            tasks[-1].result()
        data, lost = guest.destination.trace()
        found = list(RECORD.iter_unpack(data))
        assert [record[1:] for record in found] == [
            (5, tasks[0].native_id, 0, 0),
            (6, tasks[1].native_id, 1, lib.GM_TRACE_MINOR),
            (7, tasks[2].native_id, 1, lib.GM_TRACE_WRITE),
        ]
        times = [began, *(record[0] for record in found), time.monotonic_ns()]
        assert times == sorted(times)
        assert lost == 0
        assert guest.destination.trace() == (b"", 0)


def test_a_fault_outside_every_region_is_told() -> None:
    """The VMM registered more than it handed over: that is its mistake, and said."""
    with Guest((64, PAGE)) as guest:
        half = guest.memory.regions[0]
        with Memory("half", [replace(half, size=half.size // 2)], guest.files, guest.uffds) as memory:
            destination = Destination(memory)
            with RunningPager() as running:
                running.pager.add(destination)
                reader = Task(guest.read, 40)
                problem = told(destination, "stuck")
                assert isinstance(problem, HandoffError)
                assert str(problem) == f"fault at {guest.hva(40):#x}, outside every region"
                running.pager.remove(destination)
            destination.close()
            os.pwrite(guest.files[0], content(40), 40 * PAGE)
            guest.memory.unregister()
            assert reader.result() == content(40)


def test_what_the_pager_works_on_stays_alive() -> None:
    """Invariant 8: memory handed to the native side is kept, though nobody here remembers it."""
    with Guest() as guest, RunningPager() as running:
        memory = Memory("other", guest.memory.regions, guest.files, guest.uffds)
        memory.set_populate(0, guest.memory.populate[0])
        destination = Destination(memory)
        line = guest.line(0)
        lane = Lane(destination, 0, line.near.fileno(), checksum=True)
        running.pager.add(destination)
        running.pager.set_urgent(destination, lane)
        del memory, destination, lane
        gc.collect()
        churn = [bytearray(1 << 16) for _ in range(200)]
        reader = Task(guest.read, 5)
        answer(line.far, 1)
        assert reader.result() == content(5)
        assert len(churn) == 200


def cpu_seconds(thread: Task[None]) -> float:
    """What a thread has used."""
    fields = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()
    return int(fields[0]) / 1e9


@pytest.mark.parametrize("waiting", [False, True])
def test_idle_costs_nothing(waiting: bool) -> None:
    """With nothing to do, and also while somebody waits for a page that does not come."""
    with Guest() as guest, RunningPager() as running, running.serving(guest) as far:
        for page in range(20):
            reader = Task(guest.read, page)
            answer(far, 1)
            reader.result()
        if waiting:
            reader = Task(guest.read, 40)
            far.requested()
        time.sleep(0.05)  # until polling has given up
        before = cpu_seconds(running.thread)
        time.sleep(IDLE_SECONDS)
        assert cpu_seconds(running.thread) - before < 0.002
        if waiting:
            far.send(pages(0, 40, content(40)))
            assert reader.result() == content(40)


def test_stop_ends_a_pager_that_polls() -> None:
    """However long it would poll: with faults going on, it ends at once."""
    with Guest() as guest, RunningPager(poll_us=1_000_000) as running, running.serving(guest) as far:
        reader = Task(guest.read, 1)
        answer(far, 1)
        reader.result()
        began = time.monotonic()
        running.pager.stop()
        running.thread.result()
        assert time.monotonic() - began < 1.0
