"""A migration at its destination, in this process: what only happens when two things come at the same moment."""

import ctypes
import errno
import hashlib
import logging
import mmap
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from typing import BinaryIO

import pytest
import trio
from support.connection import FRAME, frame
from support.files import read_only
from support.pace import SLOWER
from support.polling import PATIENCE
from support.vmm import PAGE, Vmm

from gmemd.errors import LinkError
from gmemd.migrate import destination, wire
from gmemd.migrate.destination import IncomingMigration, Phase
from gmemd.migrate.link import ControlLane, LinkSettings, MessageStream, connect
from gmemd.migrate.state import Role
from gmemd.native import ffi, lib
from gmemd.native.destination import Pager
from gmemd.native.memory import Memory, Populate, Region
from gmemd.registry import Registry
from gmemd.sources import SourceConnections

COUNT = 8
FEATURE_REMOVE = 1 << 3
PAGES, BEAT = 2, 4  # kinds of frames
BUSY_ROUNDS = 100_000  # some tens of milliseconds
REGIONS = [[0, COUNT, 12]]
SETTINGS = LinkSettings(heartbeat=0.05 * SLOWER, dead_after=0.3 * SLOWER, handshake_timeout=5.0 * SLOWER)


class Host:
    """What a daemon has, with one migration in it."""

    def __init__(self, vmm: Vmm) -> None:
        self.vmm = vmm
        self.pager = Pager(0)
        self.registry = Registry(4, 4)
        self.sources = SourceConnections(self.registry, SETTINGS, 16, 16)
        self.port = 0
        self.faults = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # the VMM's end first
        region = Region(offset=0, size=COUNT * PAGE, page_size=PAGE, gpa=0, hva=vmm.addresses[0])
        memory = Memory("m", [region], vmm.files, [vmm.uffd])
        memory.set_populate(0, Populate.WRITE)
        self.migration = IncomingMigration(
            "m",
            memory,
            self.pager,
            SETTINGS,
            trio.CapacityLimiter(2),
            owner=0,
            state_limit=1000,
            keep_state=lambda _: None,
            keep_digests=lambda _: None,
        )
        self.migration.destination.set_vcpus(self.faults[1].fileno(), 1)

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, self.pager.run)
                try:
                    self.migration.start()
                    nursery.start_soon(self.migration.run)
                    await self._accept(nursery, task_status)
                finally:
                    with trio.CancelScope(shield=True):
                        await self.migration.close()
                    self.pager.stop()
        finally:
            self.pager.close()
            for end in self.faults:
                end.close()

    async def _accept(self, nursery: trio.Nursery, task_status: trio.TaskStatus[None]) -> None:
        async with (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0] as listener:
            self.port = listener.socket.getsockname()[1]
            task_status.started()
            while True:
                nursery.start_soon(self.sources.serve, await listener.accept())

    async def vmm_comes(self) -> None:
        await self.registry.add(self.migration)


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    with Vmm(COUNT * PAGE, features=FEATURE_REMOVE) as vmm:
        host = Host(vmm)
        async with trio.open_nursery() as nursery:
            await nursery.start(host.run)
            yield host
            nursery.cancel_scope.cancel()


class Source:
    """A source that says that it is alive, and what else it is told to say."""

    def __init__(self, host: Host, stack: AsyncExitStack) -> None:
        self.host = host
        self.urgent: MessageStream
        self._stack = stack

    async def hello(self, epoch: int = 0, token: bytes = b"") -> None:
        messages = await connect("127.0.0.1", self.host.port, 1.0)
        await self._stack.enter_async_context(messages.stream)
        self.control = ControlLane(messages, Role.SOURCE)
        await self.control.send(wire.Hello("m", epoch, token, 1, False, REGIONS))

    async def answer(self) -> wire.Message:
        """The first message that is more than a sign of life."""
        while isinstance(message := await self.control.receive(), wire.Waiting | wire.Beat):
            pass
        if isinstance(message, wire.Welcome):
            self.welcome = message
        return message

    async def lane(self, number: int) -> MessageStream:
        """A page lane that has been taken in."""
        messages = await connect("127.0.0.1", self.host.port, 1.0)
        await self._stack.enter_async_context(messages.stream)
        await messages.send(wire.LaneHello("m", self.welcome.epoch, number, self.welcome.token))
        assert await messages.receive() == wire.LaneWelcome()
        return messages

    async def requested(self) -> int:
        """The page that is asked for next, on the urgent lane, which is kept alive meanwhile."""
        while True:
            with trio.move_on_after(SETTINGS.heartbeat):
                found = FRAME.unpack(await self.urgent.stream.receive_some(FRAME.size))
                if found[1] != BEAT:
                    return int(found[5])
            await self.urgent.stream.send_all(frame(BEAT, 0, 0, 0))

    async def live(self) -> None:
        """Until cancelled."""
        while True:
            await self.control.send(wire.Beat())
            await trio.sleep(SETTINGS.heartbeat)


@pytest.fixture
def no_memory() -> Iterator[BinaryIO]:
    """A file that no userfaultfd handles."""
    with open(__file__, "rb") as file:
        yield file


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    """Of connections."""
    async with AsyncExitStack() as stack:
        yield stack


async def joined(host: Host, stack: AsyncExitStack, nursery: trio.Nursery) -> Source:
    """A source that has come as far as "go"."""
    source = Source(host, stack)
    await source.hello()
    assert isinstance(await source.answer(), wire.Welcome)
    nursery.start_soon(source.live)
    source.urgent = await source.lane(0)
    await source.lane(1)
    while (answer := await source.answer()) != wire.Go():
        assert isinstance(answer, wire.Received)
    return source


async def test_a_source_that_waited_for_long_is_not_taken_for_silent(
    host: Host, stack: AsyncExitStack, nursery: trio.Nursery
) -> None:
    source = Source(host, stack)
    await source.hello()
    for _ in range(int(2 * SETTINGS.dead_after / SETTINGS.heartbeat)):
        assert await source.control.receive() == wire.Waiting()
    await host.vmm_comes()
    assert isinstance(await source.answer(), wire.Welcome)
    nursery.start_soon(source.live)
    for _ in range(4):
        assert await source.control.receive() == wire.Beat()
    assert host.migration.epoch == 1


async def test_of_two_that_wait_for_a_place_one_gets_it(
    host: Host, stack: AsyncExitStack, nursery: trio.Nursery, expect_log: Callable[[str], None]
) -> None:
    expect_log("WARNING gmemd.sources: .*: refused: migration m has a source already: ")
    await host.vmm_comes()
    dying = Source(host, stack)
    await dying.hello()
    assert isinstance(await dying.answer(), wire.Welcome)
    answers: list[wire.Message] = []

    async def come() -> None:
        source = Source(host, stack)
        await source.hello()
        answers.append(await source.answer())
        if isinstance(answers[-1], wire.Welcome):
            nursery.start_soon(source.live)

    async with trio.open_nursery() as both:
        both.start_soon(come)
        both.start_soon(come)
    assert sorted(type(answer).__name__ for answer in answers) == ["Refused", "Welcome"]
    assert host.migration.epoch == 2
    assert host.migration.session


async def test_of_two_lanes_with_one_number_the_last_stays(
    host: Host, stack: AsyncExitStack, nursery: trio.Nursery
) -> None:
    """Each has a slot in the state of the migration, which two would share."""
    await host.vmm_comes()
    source = await joined(host, stack, nursery)
    session = host.migration.session
    assert session
    lanes: list[MessageStream] = []

    async def come() -> None:
        with suppress(LinkError):  # replaced before it was welcome
            lanes.append(await source.lane(1))

    async with trio.open_nursery() as all_of_them:
        for _ in range(5):
            all_of_them.start_soon(come)
    assert len([lane for lane in lanes if await lane.stream.receive_some()]) == 1  # the others are closed
    assert session.lanes.keys() == {0, 1}
    assert host.migration.session is session


async def test_memory_without_its_guest_is_not_complete(
    host: Host, stack: AsyncExitStack, nursery: trio.Nursery
) -> None:
    """A VMM that has discarded everything beforehand, or a source that has nothing but zeros."""
    await host.vmm_comes()
    host.migration.destination.discard(0, 0, COUNT)
    source = await joined(host, stack, nursery)
    assert host.migration.memory.received == COUNT
    for _ in range(3):
        assert await source.control.receive() == wire.Beat()
    assert not host.migration.ended.is_set()
    await source.control.send(wire.State(b"state"))
    await source.control.send(wire.Switch(5))
    await host.migration.ended.wait()
    assert host.migration.phase is Phase.COMPLETE
    assert host.migration.state == b"state"


async def meets_ranges_to_keep(
    host: Host,
    stack: AsyncExitStack,
    nursery: trio.Nursery,
    no_memory: BinaryIO,
    expect_log: Callable[[str], None],
) -> None:
    """A migration that has everything, and a VMM that has mapped something else there."""
    expect_log("ERROR gmemd.migrate.destination: region 0: unregister: Invalid argument")
    await host.vmm_comes()
    source = await joined(host, stack, nursery)
    await source.control.send(wire.Switch(0))
    host.vmm.map_over(no_memory.fileno())
    host.migration.destination.told_zero(0, 0, COUNT)
    while not host.migration.report.stuck:
        await trio.sleep(0.001)


async def test_ranges_that_cannot_be_let_go_are_tried_again(
    host: Host,
    stack: AsyncExitStack,
    nursery: trio.Nursery,
    no_memory: BinaryIO,
    expect_log: Callable[[str], None],
) -> None:
    """A VMM that has mapped something else there, or dies at this very moment."""
    await meets_ranges_to_keep(host, stack, nursery, no_memory, expect_log)
    assert host.migration.report.stuck
    assert host.migration.report.stuck.startswith("region 0: unregister: ")
    assert not host.migration.ended.is_set()
    host.vmm.map_over(host.vmm.files[0])
    await host.migration.ended.wait()
    assert host.migration.phase is Phase.COMPLETE


@pytest.fixture
def seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that are stuck are tried again many times before ranges are."""
    monkeypatch.setattr(destination, "SPACE_SECONDS", 0.005)
    monkeypatch.setattr(destination, "FIRST_PAUSE", 0.1)


@pytest.mark.usefixtures("seldom")
async def test_ranges_that_cannot_be_let_go_are_one_trouble(
    host: Host,
    stack: AsyncExitStack,
    nursery: trio.Nursery,
    no_memory: BinaryIO,
    expect_log: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """That pages meet none meanwhile does not end it."""
    caplog.set_level(logging.INFO, "gmemd.migrate.destination")
    await meets_ranges_to_keep(host, stack, nursery, no_memory, expect_log)
    host.vmm.map_over(host.vmm.files[0])
    await host.migration.ended.wait()
    assert "goes on" not in caplog.text


@pytest.fixture
def spare_cpu() -> Iterator[int]:
    """One that this thread does without, and that may be taken from others."""
    usual = os.sched_getaffinity(0)
    if len(usual) < 2 or os.geteuid():
        pytest.skip("it takes root, and two CPUs, to keep others from one of them")
    os.sched_setaffinity(0, usual - {max(usual)})
    yield max(usual)
    os.sched_setaffinity(0, usual)


class Busy(threading.Thread):
    """For a while nobody else gets that CPU."""

    def __init__(self, cpu: int) -> None:
        super().__init__(daemon=True)
        self._cpu, self._has_it = cpu, threading.Event()
        self.start()
        assert self._has_it.wait(PATIENCE)

    def run(self) -> None:
        os.sched_setaffinity(0, {self._cpu})
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        self._has_it.set()
        hashlib.pbkdf2_hmac("sha256", b"", b"", BUSY_ROUNDS)


class Balloon(threading.Thread):
    """A thread of the VMM that takes the first page out, on that CPU alone."""

    def __init__(self, vmm: Vmm, cpu: int) -> None:
        super().__init__(daemon=True)
        self._where = (ctypes.c_void_p(vmm.addresses[0]), ctypes.c_size_t(PAGE), mmap.MADV_DONTNEED)
        self._cpu = cpu
        self.start()

    def run(self) -> None:
        os.sched_setaffinity(0, {self._cpu})
        ctypes.CDLL(None).madvise(*self._where)


async def test_a_thread_that_is_slow_to_come_back_from_its_event(
    host: Host, stack: AsyncExitStack, nursery: trio.Nursery, spare_cpu: int, caplog: pytest.LogCaptureFixture
) -> None:
    """That is no error, and when it is back, the migration is complete."""
    caplog.set_level(logging.DEBUG, "gmemd.migrate.destination")
    await host.vmm_comes()
    source = await joined(host, stack, nursery)
    await source.control.send(wire.Switch(0))
    await host.migration.ready.wait()
    host.pager.remove(host.migration.destination)  # so the event is first read at the end
    balloon, done = Balloon(host.vmm, spare_cpu), ffi.new("uint64_t *")
    while lib.gm_uffd_continue(host.vmm.uffd, host.vmm.addresses[0], PAGE, PAGE, done) != -errno.EAGAIN:
        await trio.sleep(0.001)
    busy = Busy(spare_cpu)
    host.migration.destination.told_zero(0, 0, COUNT)
    await host.migration.ended.wait()
    assert host.migration.phase is Phase.COMPLETE
    assert "is in its event still" in caplog.text
    for thread in (balloon, busy):
        thread.join(PATIENCE)
    host.pager.add(host.migration.destination)


async def until_stuck(host: Host, by: str) -> None:
    while not (host.migration.report.stuck or "").startswith(by):
        await trio.sleep(0.001)


async def test_a_page_is_asked_for_again_though_the_vmm_is_broken(
    host: Host, stack: AsyncExitStack, nursery: trio.Nursery, expect_log: Callable[[str], None]
) -> None:
    """Nobody reads its fault socket any more; what the host lacked for a page is another matter, and passes."""
    expect_log("ERROR gmemd.migrate.destination: fault socket: closed by the VMM")
    await host.vmm_comes()
    source = await joined(host, stack, nursery)
    await source.control.send(wire.Switch(0))
    await host.migration.ready.wait()
    host.faults[0].close()
    await until_stuck(host, "fault socket")
    touch = host.vmm.touch(3)
    assert await source.requested() == 3
    page = frame(PAGES, 0, 3, 1, b"3" * PAGE)
    with read_only(host.vmm.files[0]):
        await source.urgent.stream.send_all(page)
        await until_stuck(host, "region 0: pages 3 to 3 cannot be put in place")
    assert await source.requested() == 3
    await source.urgent.stream.send_all(page)
    while touch.is_alive():
        await trio.sleep(0.001)
    assert touch.result() == b"3" * PAGE


async def test_a_source_that_comes_as_it_ends_tries_again(host: Host, stack: AsyncExitStack) -> None:
    await host.vmm_comes()
    host.migration.end(Phase.ABANDONED)
    source = Source(host, stack)
    await source.hello()
    with pytest.raises(LinkError):
        await source.answer()
