"""A guest, lanes and threads for tests of the native layer: memory files and userfaultfds are real, the source is
played.

Whatever touches guest memory does so in a system call, which waits for a page without the GIL.
"""

import fcntl
import mmap
import os
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeVar

import native_frames as frames
import pytest
from cffi import FFI
from support.pace import SLOWER

from gmemd.errors import GmemdError
from gmemd.native import check, lib
from gmemd.native import ffi as native_ffi
from gmemd.native.destination import Destination, Lane, Pager
from gmemd.native.memory import Memory, Populate, Region
from gmemd_tools import tmpfs

PAGE, HUGE = 4096, 2 << 20
PATIENCE = 10.0 * SLOWER  # seconds; nothing here takes a tenth of it
BUDGET_US = 50_000
POLL_US = 50
STATE_MESSAGES = 64 * 32  # bytes that end a state, behind the bitmaps

EVENT_FAULT, EVENT_REMOVE = 0x12, 0x15
FEATURE_REMOVE, FEATURE_THREAD_ID = 1 << 3, 1 << 8
FAULT_MINOR = 1 << 2
MAP_NORESERVE = 0x4000

# How pages get their content, and into what: write() has a way of its own with large folios.
LARGE_FOLIOS: Literal["large folios"] = "large folios"
Way = Populate | Literal["large folios"]
WAYS: list[Way] = [*Populate, LARGE_FOLIOS]

T = TypeVar("T")
Run = Callable[[], None]

libc_ffi = FFI()
libc_ffi.cdef("int madvise(void *, size_t, int);")
libc: Any = libc_ffi.dlopen(None)


class Task(threading.Thread, Generic[T]):
    """A thread whose result, or exception, comes out of `result`."""

    def __init__(self, work: Callable[..., T], *args: Any) -> None:
        super().__init__(daemon=True)  # a failed test may leave it waiting for a page
        self._work, self._given = work, args
        self._problem: BaseException | None = None
        self._value: T
        self.start()

    def run(self) -> None:
        try:
            self._value = self._work(*self._given)
        except BaseException as problem:
            self._problem = problem

    def result(self) -> T:
        self.join(PATIENCE)
        assert not self.is_alive(), "the thread still waits"
        if self._problem is not None:
            raise self._problem
        return self._value


def until(true: Callable[[], bool]) -> None:
    """Looks again and again, for what tells nobody when it happens."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.0005)


def content(page: int, region: int = 0, size: int = PAGE, version: int = 0) -> bytes:
    """What a page of the source holds: one word over and over, never zero, so that half a page shows."""
    word = (page + 1) << 24 | region << 8 | version << 1 | 1
    return struct.pack("<Q", word) * (size // 8)


def whole(data: bytes) -> bool:
    """Whether a page is of one piece, be it content or zeros."""
    return data == data[:8] * (len(data) // 8)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        far = socket.create_connection(server.getsockname())
        near, _ = server.accept()
    for end in (far, near):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    far.settimeout(PATIENCE)
    near.setblocking(False)
    return far, near


class Far:
    """The peer's end of a lane, played."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def close(self) -> None:
        self.socket.close()

    def all_sent(self) -> bool:
        """Whether everything has come to the other host's socket."""
        left = fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4))
        return int.from_bytes(left, "little") == 0

    def receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            assert more, "the lane was closed"
            data += more
        return data

    def frame(self) -> frames.Frame:
        """The next frame's header, its checksum verified."""
        frame = frames.Frame.decode(self.receive(frames.HEADER.size))
        assert frame.intact(), frame
        return frame

    def frame_and_payload(self) -> tuple[frames.Frame, bytes]:
        frame = frames.Frame.decode(self.receive(frames.HEADER.size))
        payload = self.receive(frame.length)
        assert frame.intact(payload), frame
        return frame, payload

    def requested(self) -> tuple[int, int, int]:
        """The next request: region, first page, pages."""
        frame = self.frame()
        assert frame.kind == frames.REQUEST, frame
        return frame.region, frame.first, frame.count


class Line:
    """A lane at the destination with its peer's end, fed by the test's own thread."""

    def __init__(self, lane: Lane, far: Far, near: socket.socket) -> None:
        self.lane, self.far, self.near = lane, far, near

    def feed(self, *data: bytes) -> None:
        """Sends to the lane, and has it deal with all of that."""
        sender = Task(self.far.send, b"".join(data))
        while sender.is_alive():
            self.lane.receive(BUDGET_US)
        sender.result()
        self.deal()

    def deal(self) -> None:
        """Has the lane deal with all that was sent, or that it has room for."""
        while True:
            sent = self.far.all_sent()
            more = self.lane.receive(BUDGET_US)
            if sent and (not more or self.lane.held):
                return

    def close(self) -> None:
        self.lane.close()
        self.near.close()
        self.far.close()


class Guest:
    """Guest memory at a destination, mapped in this process and registered: `shapes` are (pages, page size)."""

    def __init__(
        self,
        *shapes: tuple[int, int],
        populate: Way = Populate.WRITE,
        features: int = 0,
        uffd_each: bool = False,
        files: Sequence[int] | None = None,
        trace: bool = False,
        register: bool = True,
        reserve: bool = True,
    ) -> None:
        self.shapes = shapes or ((64, PAGE),)
        self._stack = ExitStack()
        way = populate if isinstance(populate, Populate) else Populate.WRITE
        make = large_file if populate == LARGE_FOLIOS else new_file
        self.files = [self._own(made) for made in files or [make(*shape) for shape in self.shapes]]
        flags = mmap.MAP_SHARED | (0 if reserve else MAP_NORESERVE)
        sizes = [pages * size for pages, size in self.shapes]
        self.maps = [self._map(fd, size, flags) for fd, size in zip(self.files, sizes, strict=True)]
        count = len(self.shapes) if uffd_each else 1
        # Closed before the mappings are: whoever still waits then goes on.
        self.uffds = [self._own(check(lib.gm_uffd_open, features)) for _ in range(count)]
        self.hvas = [address_of(made) for made in self.maps]
        gpa = 0
        regions = []
        for i, (pages, size) in enumerate(self.shapes):
            regions.append(
                Region(
                    offset=0,
                    size=pages * size,
                    page_size=size,
                    gpa=gpa,
                    hva=self.hvas[i],
                    file=i,
                    uffd=i if uffd_each else 0,
                )
            )
            gpa += 2 * pages * size
        self.memory = self.new_memory(regions)
        self._stack.callback(self.memory.close)
        for region in range(len(regions)):
            self.memory.set_populate(region, way)
        if register:
            self.memory.register()
        self.destination = Destination(self.memory, trace=trace)
        self._stack.callback(self.destination.close)

    def new_memory(self, regions: list[Region]) -> Memory:
        return Memory("test", regions, self.files, self.uffds)

    def _own(self, fd: int) -> int:
        self._stack.callback(os.close, fd)
        return fd

    def _map(self, fd: int, size: int, flags: int) -> mmap.mmap:
        made = mmap.mmap(fd, size, flags)

        def close() -> bool:
            try:
                made.close()
            except BufferError:  # a thread that waited till the end is on its way out
                return False
            return True

        self._stack.callback(until, close)
        return made

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def line(self, index: int = 1, *, checksum: bool = True) -> Line:
        """A new lane; closed with the guest."""
        far, near = tcp_pair()
        line = Line(Lane(self.destination, index, near.fileno(), checksum=checksum), Far(far), near)
        self._stack.callback(line.close)
        return line

    def counter(self, name: str) -> int:
        return self.destination.counters()[name]

    def _view(self, region: int, start: int, length: int) -> memoryview:
        return memoryview(self.maps[region])[start : start + length]

    def read(self, page: int, region: int = 0) -> bytes:
        """What the guest sees; waits until the page is there, the test's own thread not for ever."""
        if threading.current_thread() is threading.main_thread():
            return Task(self.read, page, region).result()
        size = self.shapes[region][1]
        with scratch(b"") as fd, self._view(region, page * size, size) as view:
            os.pwrite(fd, view, 0)
            return os.pread(fd, size, 0)

    def write(self, page: int, data: bytes, region: int = 0) -> None:
        """The guest writes from the beginning of a page; waits as `read` does."""
        if threading.current_thread() is threading.main_thread():
            Task(self.write, page, data, region).result()
            return
        size = self.shapes[region][1]
        with scratch(data) as fd, self._view(region, page * size, len(data)) as view:
            assert os.preadv(fd, [view], 0) == len(data)

    def held(self, page: int, region: int = 0) -> bytes:
        """What the memory file holds; nobody waits."""
        size = self.shapes[region][1]
        return os.pread(self.files[region], size, page * size)

    def present(self, page: int, region: int = 0) -> bool:
        """Whether the memory file has the page at all."""
        size = self.shapes[region][1]
        try:
            return os.lseek(self.files[region], page * size, os.SEEK_DATA) < (page + 1) * size
        except OSError:  # ENXIO: nothing from there on
            return False

    def hva(self, page: int, region: int = 0) -> int:
        return self.hvas[region] + page * self.shapes[region][1]

    def remove(self, page: int, count: int = 1, region: int = 0) -> None:
        """The balloon takes pages out; waits until the event is read."""
        length = count * self.shapes[region][1]
        address = libc_ffi.cast("void *", self.hva(page, region))
        assert libc.madvise(address, length, mmap.MADV_REMOVE) == 0, os.strerror(libc_ffi.errno)

    def unread_faults(self) -> int:
        """Of the first userfaultfd, as the kernel shows them to us."""
        with open(f"/proc/self/fdinfo/{self.uffds[0]}") as file:
            return int(next(line for line in file if line.startswith("pending:")).split()[1])

    def received(self, region: int = 0) -> set[int]:
        """The received bitmap, as page numbers."""
        runs = (run for some in self.memory.received_runs(region) for run in some)
        return {page for first, count in runs for page in range(first, first + count)}


def new_file(pages: int, size: int) -> int:
    return check(lib.gm_memfile_memfd, b"test", pages * size, size if size == HUGE else 0)


def large_file(pages: int, size: int) -> int:
    if missing := tmpfs.missing():
        pytest.skip(missing)
    return tmpfs.large_folio_file(pages * size)


def address_of(made: mmap.mmap) -> int:
    with native_ffi.from_buffer(made) as held:
        return int(native_ffi.cast("uintptr_t", held))


@contextmanager
def scratch(data: bytes) -> Iterator[int]:
    fd = os.memfd_create("scratch", os.MFD_CLOEXEC)
    try:
        os.pwrite(fd, data, 0)
        yield fd
    finally:
        os.close(fd)


class RunningPager:
    """A pager in its thread; `within` is called there, to run it."""

    def __init__(self, poll_us: int = POLL_US, within: Callable[[Run], None] = lambda run: run()) -> None:
        self.pager = Pager(poll_us)
        self.thread = Task(within, self.pager.run)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.pager.stop()
        self.thread.result()
        self.pager.close()

    def serve(self, guest: Guest, *, checksum: bool = True) -> Far:
        """A new urgent lane, whose peer is the test."""
        line = guest.line(0, checksum=checksum)
        self.pager.set_urgent(guest.destination, line.lane)
        return line.far

    @contextmanager
    def watching(self, guest: Guest) -> Iterator[None]:
        """The guest's faults are read; nobody can be asked for a page."""
        self.pager.add(guest.destination)
        try:
            yield
        finally:
            self.pager.remove(guest.destination)

    @contextmanager
    def serving(self, guest: Guest, *, checksum: bool = True) -> Iterator[Far]:
        """The guest's faults are read, and asked for on an urgent lane."""
        with self.watching(guest):
            yield self.serve(guest, checksum=checksum)


@contextmanager
def watched(guest: Guest) -> Iterator[None]:
    """The guest's faults are read, by a pager of its own; nobody can be asked for a page."""
    with RunningPager() as running, running.watching(guest):
        yield


@contextmanager
def paged(guest: Guest, *, checksum: bool = True) -> Iterator[Far]:
    """The same with a pager of its own."""
    with RunningPager() as running, running.serving(guest, checksum=checksum) as far:
        yield far


def told(destination: Destination, event: str) -> GmemdError:
    """Waits for an event, by its name in `Events`; returns the problem that comes with it."""
    end = time.monotonic() + PATIENCE
    while not getattr(events := destination.events(), event):
        assert time.monotonic() < end, f"{event} is not told"
        select.select([destination.event_fd], [], [], PATIENCE)
    return events.problem


HUGE_COUNT = "/proc/sys/vm/nr_hugepages"
HUGE_FREE = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages"


@contextmanager
def huge_pages(count: int) -> Iterator[Callable[[int], None]]:
    """As many huge pages as that in the pool, or the test is skipped. What it gives changes that number."""

    def change(wanted: int) -> None:
        Path(HUGE_COUNT).write_text(str(before + wanted))

    try:
        before = int(Path(HUGE_COUNT).read_text())
        change(count)
    except (FileNotFoundError, PermissionError) as error:
        pytest.skip(f"huge pages: {error}")
    try:
        if int(Path(HUGE_FREE).read_text()) < count:
            pytest.skip(f"{count} free huge pages cannot be had")
        yield change
    finally:
        change(0)
