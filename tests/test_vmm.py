"""The reference VMM on its own: the tests play gmemd-source and the daemon, and copy memory themselves."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import select
import shutil
import socket
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SOURCES = Path(__file__).parent.parent / "tools/vmm"
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-g", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-pthread"]
PAGE = 4096
PATIENCE = 60.0  # seconds; nothing here takes a tenth of it
MESSAGE_LIMIT = 128 << 10

EX_USAGE, EX_DATAERR, EX_UNAVAILABLE, EX_PROTOCOL, EX_CONFIG = 64, 65, 69, 76, 78

# Where in the state blob its parts begin (tools/vmm/state.h).
STATE_VERSION, STATE_STOPPED = 8, 64

Event = dict[str, Any]


def compile_vmm(target: Path, *flags: str) -> Path:
    sources = sorted(map(str, SOURCES.glob("*.c")))
    subprocess.run(["cc", *FLAGS, *flags, *sources, "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="session")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = SOURCES / "gmemd-vmm"
    newest = max(path.stat().st_mtime for path in SOURCES.glob("*.[ch]"))
    if built.exists() and built.stat().st_mtime >= newest:
        return built
    if not shutil.which("cc"):
        pytest.skip("no gmemd-vmm built, and no C compiler to build it with")
    return compile_vmm(tmp_path_factory.mktemp("vmm") / "gmemd-vmm")


@pytest.fixture(params=["kvm", "threads"])
def guest(request: pytest.FixtureRequest) -> str:
    if request.param == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm cannot be opened here")
    return str(request.param)


class Vmm:
    """A running gmemd-vmm, by its events and commands."""

    def __init__(self, binary: Path, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [str(binary), *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._unread = b""

    def event(self) -> Event:
        """The next event; fails when none comes."""
        assert self.process.stdout
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self._unread:
            assert select.select([descriptor], [], [], PATIENCE)[0], "no event came"
            more = os.read(descriptor, 1 << 16)
            assert more, f"gmemd-vmm ended with {self.process.wait(PATIENCE)}"
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        event: Event = json.loads(line)
        return event

    def expect(self, name: str) -> Event:
        event = self.event()
        assert event["event"] == name, event
        return event

    def command(self, *words: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(" ".join(words).encode() + b"\n")
        self.process.stdin.flush()

    def end(self) -> int:
        """Ends it as the end of stdin does; returns its exit code."""
        assert self.process.stdin
        assert self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            self.process.stdout.close()


@pytest.fixture
def start(binary: Path) -> Iterator[Callable[..., Vmm]]:
    started: list[Vmm] = []

    def start(*arguments: object, program: Path = binary) -> Vmm:
        started.append(Vmm(program, *arguments))
        return started[-1]

    yield start
    for vmm in started:
        vmm.end()


class Peer:
    """One end of a hand-off conversation."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(PATIENCE)
        self.connection = connection
        self.files: list[int] = []

    def send(self, message: Event | bytes, *files: int) -> None:
        data = message if isinstance(message, bytes) else json.dumps(message).encode()
        socket.send_fds(self.connection, [data], files)

    def receive(self) -> tuple[Event, list[int]]:
        data, files, flags, _ = socket.recv_fds(self.connection, MESSAGE_LIMIT, 64)
        self.files += files
        assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
        assert data, "the other end closed the connection"
        message: Event = json.loads(data)
        return message, files

    def ask(self, message: Event | bytes) -> tuple[Event, list[int]]:
        self.send(message)
        return self.receive()

    def close(self) -> None:
        self.connection.close()
        while self.files:
            os.close(self.files.pop())


@pytest.fixture
def sockets(tmp_path: Path) -> Iterator[Sockets]:
    sockets = Sockets(tmp_path)
    yield sockets
    sockets.close()


class Sockets:
    """Connects as gmemd-source does, listens as the daemon does."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "source.sock"
        self.daemon = folder / "daemon.sock"
        self._peers: list[Peer] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.settimeout(PATIENCE)
        self._listener.bind(str(self.daemon))
        self._listener.listen()

    def to_source(self) -> Peer:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(str(self.source))
        self._peers.append(Peer(connection))
        return self._peers[-1]

    def from_destination(self) -> Peer:
        self._peers.append(Peer(self._listener.accept()[0]))
        return self._peers[-1]

    def close(self) -> None:
        self._listener.close()
        for peer in self._peers:
            peer.close()


class Guest:
    """A guest on its way: paused at the source, waiting for "ready" at the destination; memory in our hands."""

    def __init__(
        self,
        start: Callable[..., Vmm],
        sockets: Sockets,
        *machine: object,
        workload: Sequence[object] = (),
        arrives_as: Sequence[object] = (),
    ) -> None:
        self.source = start("source", "--listen", sockets.source, *machine, *workload)
        self.source.expect("filled")
        self.source.expect("running")
        name = ["--gmemd", sockets.daemon, "--migration", "m1"]
        self.destination = start("destination", *name, *machine, *arrives_as)
        self.daemon = sockets.from_destination()
        self.offer, self.to = self.daemon.receive()
        self.sender = sockets.to_source()
        self.regions, self.since = self.sender.ask({"gmemd": 1, "send": "m1"})

    def pause(self, least_steps: int = 0) -> None:
        """Stops the guest; lets it go on as long as its first vCPU has not done so many steps."""
        while True:
            answer, files = self.sender.ask({"pause": True})
            assert answer == {"paused": True, "state": 0}
            self.paused = self.source.expect("paused")
            if self.paused["steps"][0] >= least_steps:
                break
            self.sender.send({"error": "too early", "resume": True})
            self.source.expect("failed")
            self.source.expect("resumed")
        self.state = os.pread(files[0], 1 << 20, 0)

    def copy(self) -> None:
        """Copies what the source's files have into the destination's, holes left out."""
        for index, file in enumerate(self.since):
            size = os.fstat(file).st_size
            with mmap.mmap(file, size) as old, mmap.mmap(self.to[index], size) as new:
                for first, last in data_of(file, size):
                    new[first:last] = old[first:last]

    def ready(self) -> None:
        state = os.memfd_create("state")
        os.write(state, self.state)
        self.daemon.send({"ready": True, "state": 0, "trap": "none", "populate": "copy"}, state)
        os.close(state)

    def move(self) -> None:
        self.pause()
        self.copy()
        self.ready()
        self.destination.expect("ready")

    def done(self) -> Event:
        self.daemon.send({"done": True, "pages": 0})
        return self.destination.expect("done")

    def memory(self) -> mmap.mmap:
        """The destination's memory, of a machine with one region."""
        return mmap.mmap(self.to[0], self.offer["regions"][0]["size"])

    def verify(self) -> Event:
        self.destination.command("verify", *self.paused["memory"])
        return self.destination.event()


def data_of(file: int, size: int) -> Iterator[tuple[int, int]]:
    """The ranges of a file that are not holes."""
    first = 0
    while first < size:
        try:
            first = os.lseek(file, first, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # hugetlb and guest_memfd do not tell
                yield first, size
            return
        last = os.lseek(file, first, os.SEEK_HOLE)
        yield first, last
        first = last


def assert_right(event: Event) -> None:
    assert event["event"] == "verified", event
    assert event["ok"] is True, event
    assert event["pages_verified"] == event["pages"] == event["guest_verified"] + event["host_verified"]
    assert event["mismatches"] == 0


class Layout:
    """Where things are in guest memory, read from the guest's parameters (tools/vmm/guest.h)."""

    def __init__(self, memory: mmap.mmap) -> None:
        words = struct.unpack_from("<19Q", memory, PAGE)
        self.seed = words[0]
        self.stacks, self.program, self.tables, self.ledger = words[10:14]
        self.data, _, self.data_pages, self.shared_pages = words[15:19]


def mix(x: int) -> int:
    mask = (1 << 64) - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31


def content(seed: int, page: int, version: int) -> bytes:
    """What a data page has at a version, written anew from the description in tools/vmm/workload.h."""
    mask, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15
    if version == 0:
        return bytes(PAGE)
    first = mix(mix(seed + page * golden & mask) + version & mask)
    return struct.pack("<512Q", *((first + i * golden) & mask for i in range(512)))


@pytest.mark.parametrize("pattern", ["sequential", "random", "strided", "hotset"])
def test_a_guest_alone_does_what_the_model_says(
    start: Callable[..., Vmm], sockets: Sockets, guest: str, pattern: str
) -> None:
    vmm = start(
        "source", "--listen", sockets.source, "--memory", "16M", "--vcpus", "3",
        "--guest", guest, "--pattern", pattern, "--seed", "7",
    )  # fmt: skip
    filled = vmm.expect("filled")
    assert filled["guest"] == guest
    vmm.expect("running")
    vmm.command("verify")
    event = vmm.expect("verified")
    assert_right(event)
    assert event["guest_verified"] == filled["data_pages"]
    assert vmm.end() == 0


def test_the_fill_leaves_holes(start: Callable[..., Vmm], sockets: Sockets, guest: str) -> None:
    vmm = start(
        "source", "--listen", sockets.source, "--memory", "64M", "--zero-share", "40",
        "--guest", guest, "--rate", "1",
    )  # fmt: skip
    vmm.expect("filled")
    vmm.expect("running")
    _, files = sockets.to_source().ask({"gmemd": 1, "send": "m1"})
    share = 1 - os.fstat(files[0]).st_blocks * 512 / (64 << 20)
    assert 0.36 < share < 0.44


MACHINES = [
    pytest.param(["--memory", "32M", "--vcpus", "1"], id="1-vcpu"),
    pytest.param(["--memory", "48M", "--vcpus", "4", "--regions", "5"], id="4-vcpus-5-regions"),
    pytest.param(["--memory", "64M", "--vcpus", "8", "--regions", "64"], id="8-vcpus-64-regions"),
    pytest.param(["--memory", "33M", "--vcpus", "2", "--regions", "2"], id="odd-size"),
]


@pytest.mark.parametrize("machine", MACHINES)
def test_a_guest_moves(start: Callable[..., Vmm], sockets: Sockets, guest: str, machine: list[str]) -> None:
    moved = Guest(start, sockets, *machine, "--guest", guest)
    moved.move()
    first = moved.destination.expect("first-instruction")
    assert 0 <= first["at_ns"] - moved.paused["at_ns"] == pytest.approx(first["downtime_us"] * 1000, abs=1000)
    moved.done()
    event = moved.verify()
    assert_right(event)
    assert event["against_source"] > 0
    assert all(new >= old for new, old in zip(event["steps"], moved.paused["steps"], strict=True))
    assert moved.destination.end() == 0


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """48 huge pages of 2 MiB, given back afterwards."""
    pool = Path("/proc/sys/vm/nr_hugepages")
    before = pool.read_text()
    try:
        pool.write_text("48")
    except OSError as error:
        pytest.skip(f"no huge pages are to be had: {error.strerror}")
    yield
    pool.write_text(before)


@pytest.mark.usefixtures("huge_pages")
@pytest.mark.parametrize("backing", ["hugetlb", "mixed"])
def test_a_guest_moves_in_huge_pages(
    start: Callable[..., Vmm], sockets: Sockets, guest: str, backing: str
) -> None:
    machine = ["--memory", "48M", "--vcpus", "2", "--regions", "4", "--backing", backing, "--guest", guest]
    moved = Guest(start, sockets, *machine)
    sizes = {region["page_size"] for region in moved.offer["regions"]}
    assert sizes == ({2 << 20} if backing == "hugetlb" else {2 << 20, PAGE})
    for region in moved.offer["regions"]:
        assert region["hva"] % region["page_size"] == region["gpa"] % region["page_size"] == 0
    moved.move()
    moved.destination.expect("first-instruction")
    moved.done()
    assert_right(moved.verify())


@pytest.mark.usefixtures("require_kvm")
def test_a_guest_moves_in_guest_memfd(start: Callable[..., Vmm], sockets: Sockets) -> None:
    machine = ["--memory", "32M", "--regions", "3", "--backing", "guest_memfd", "--guest", "kvm"]
    probe = start("source", "--listen", sockets.source, *machine)
    if probe.event()["event"] == "error":
        pytest.skip("this kernel has no guest_memfd that can be mapped")
    probe.end()
    moved = Guest(start, sockets, *machine)
    moved.move()
    moved.destination.expect("first-instruction")
    moved.done()
    event = moved.verify()
    assert_right(event)
    assert event["against_source"] > 0


def test_the_hand_off_is_as_documented(start: Callable[..., Vmm], sockets: Sockets) -> None:
    moved = Guest(start, sockets, "--memory", "40M", "--regions", "6")
    assert moved.offer["gmemd"] == 1
    assert moved.offer["receive"] == "m1"
    gpa = 0
    for there, here in zip(moved.regions["regions"], moved.offer["regions"], strict=True):
        assert {**here, **there} == here
        assert set(here) - set(there) == {"hva", "uffd"}
        assert here["gpa"] == gpa
        gpa += here["size"]
        assert os.fstat(moved.to[here["file"]]).st_size >= here["offset"] + here["size"]
    assert gpa == 40 << 20
    assert [region["size"] // PAGE % 2 for region in moved.offer["regions"][:-1]] == [1] * 5
    uffd = moved.to[moved.offer["regions"][0]["uffd"]]
    assert os.readlink(f"/proc/self/fd/{uffd}") == "anon_inode:[userfaultfd]"
    assert fcntl.fcntl(uffd, fcntl.F_GETFL) & os.O_NONBLOCK
    # Nothing of its memory has been touched.
    assert [os.fstat(file).st_blocks for file in moved.to[:-1]] == [0] * 3


UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_COPY = 0xC020AA00, 0x8010AA01, 0xC028AA03
UFFD_PAGEFAULT = 0x12
REGISTER_MISSING = 1


class Pager:
    """Answers faults at a destination with pages of the source, one at a time, until it is told to bring all."""

    def __init__(self, moved: Guest) -> None:
        self.region = moved.offer["regions"][0]
        self.uffd = moved.to[1]
        self.source = mmap.mmap(moved.since[0], self.region["size"])
        self.buffer = mmap.mmap(-1, PAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))
        self.faults = 0
        register = struct.pack("<QQQQ", self.region["hva"], self.region["size"], REGISTER_MISSING, 0)
        fcntl.ioctl(self.uffd, UFFDIO_REGISTER, register)

    def bring(self, offset: int) -> None:
        self.buffer[:] = self.source[offset : offset + PAGE]
        copy = struct.pack("<QQQQq", self.region["hva"] + offset, self.address, PAGE, 0, 0)
        with contextlib.suppress(FileExistsError):
            fcntl.ioctl(self.uffd, UFFDIO_COPY, copy)

    def answer(self, faults: int) -> None:
        while self.faults < faults:
            assert select.select([self.uffd], [], [], PATIENCE)[0], "nothing faults"
            event, address = struct.unpack("<B15xQ8x", os.read(self.uffd, 32))
            assert event == UFFD_PAGEFAULT
            self.faults += 1
            self.bring((address & -PAGE) - self.region["hva"])

    def finish(self) -> None:
        for offset in range(0, self.region["size"], PAGE):
            self.bring(offset)
        span = struct.pack("<QQ", self.region["hva"], self.region["size"])
        fcntl.ioctl(self.uffd, UFFDIO_UNREGISTER, span)
        self.source.close()


def test_a_guest_runs_while_its_pages_come_one_by_one(
    start: Callable[..., Vmm], sockets: Sockets, guest: str
) -> None:
    moved = Guest(start, sockets, "--memory", "8M", "--vcpus", "2", "--guest", guest)
    moved.pause()
    pager = Pager(moved)
    moved.ready()
    pager.answer(500)
    moved.destination.expect("ready")
    moved.destination.expect("first-instruction")
    moved.destination.command("verify")
    assert "not complete" in moved.destination.expect("refused")["message"]
    pager.finish()
    moved.done()
    event = moved.verify()
    assert_right(event)
    assert event["touches"] > 400  # the others are for the low area
    assert sum(event["steps"]) > sum(moved.paused["steps"])
    assert 0 < event["touch_latency_us"]["p50"] <= event["touch_latency_us"]["p99"]
    assert event["touch_latency_us"]["p99"] <= event["touch_latency_us"]["max"]
    assert 0.05 < event["blocked_share"] <= 1


class Damage:
    """A guest with one region whose memory is at the destination, before it runs, for a test to spoil."""

    def __init__(self, start: Callable[..., Vmm], sockets: Sockets, guest: str) -> None:
        # Sequential: so we know which page a vCPU may be in the middle of.
        self.moved = Guest(
            start, sockets, "--memory", "8M", "--guest", guest, workload=["--pattern", "sequential"]
        )
        self.moved.pause(least_steps=(8 << 20) // PAGE)  # each page that it owns once
        self.moved.copy()
        self.memory = self.moved.memory()
        self.layout = Layout(self.memory)

    def page(self, version: int) -> int:
        """A page that has this version at least, and that nobody is writing."""
        owned = self.layout.data_pages - self.layout.shared_pages
        current = self.moved.paused["steps"][0] % owned
        for index in range(owned):
            page = self.layout.shared_pages + index
            if index != current and self.version(page) >= version:
                assert self.read(page) == content(self.layout.seed, page, self.version(page))
                return page
        raise AssertionError("there is no such page")

    def version(self, page: int) -> int:
        return int(struct.unpack_from("<I", self.memory, self.layout.ledger + 4 * page)[0])

    def address(self, page: int) -> int:
        return self.layout.data + page * PAGE

    def read(self, page: int) -> bytes:
        return self.memory[self.address(page) : self.address(page) + PAGE]

    def write(self, page: int, data: bytes) -> None:
        self.memory[self.address(page) : self.address(page) + PAGE] = data

    def flip(self, address: int) -> None:
        self.memory[address] ^= 0x10

    def outcome(self) -> tuple[list[Event], Event]:
        """Runs the guest to its end: the mismatches that it found, and the event "verified"."""
        self.memory.close()
        destination = self.moved.destination
        self.moved.ready()
        self.moved.daemon.send({"done": True, "pages": 0})
        events = [destination.event()]
        while events[-1]["event"] != "done":
            events.append(destination.event())
        destination.command("verify", *self.moved.paused["memory"])
        while events[-1]["event"] != "verified":
            events.append(destination.event())
        assert events[-1]["ok"] is False
        assert events[-1]["pages_verified"] < events[-1]["pages"]
        assert destination.end() == EX_DATAERR
        return [event for event in events if event["event"] == "mismatch"], events[-1]


def word(data: bytes, offset: int) -> str:
    return f"0x{struct.unpack_from('<Q', data, offset & -8)[0]:016x}"


@pytest.fixture
def damage(start: Callable[..., Vmm], sockets: Sockets, guest: str) -> Damage:
    return Damage(start, sockets, guest)


def assert_found(damage: Damage, page: int, right: bytes, wrong: bytes) -> None:
    """The guest stopped at that page and said where; the host found the same and nothing else."""
    offset = next(i for i in range(0, PAGE, 8) if right[i : i + 8] != wrong[i : i + 8])
    where = {
        "address": damage.address(page) + offset,
        "expected": word(right, offset),
        "found": word(wrong, offset),
    }
    (mismatch,), verified = damage.outcome()
    assert where.items() <= mismatch.items()
    assert mismatch["page"] == page
    assert verified["first_wrong"] == where
    assert verified["mismatches"] == 1


def test_a_flipped_byte_is_found(damage: Damage) -> None:
    page = damage.page(2)
    right = damage.read(page)
    damage.flip(damage.address(page) + 3001)
    assert_found(damage, page, right, damage.read(page))


def test_a_flipped_byte_in_a_shared_page_is_found(damage: Damage) -> None:
    page = next(page for page in range(damage.layout.shared_pages) if damage.version(page))
    right = damage.read(page)
    damage.flip(damage.address(page))
    assert_found(damage, page, right, damage.read(page))


def test_a_stale_page_is_found(damage: Damage) -> None:
    page = damage.page(2)
    right = damage.read(page)
    damage.write(page, content(damage.layout.seed, page, damage.version(page) - 1))
    assert_found(damage, page, right, damage.read(page))


def test_zeros_in_place_of_a_page_are_found(damage: Damage) -> None:
    page = damage.page(1)
    right = damage.read(page)
    damage.write(page, bytes(PAGE))
    assert_found(damage, page, right, bytes(PAGE))


def test_the_page_of_another_address_is_found(damage: Damage) -> None:
    page = damage.page(2)
    right = damage.read(page)
    damage.write(page, content(damage.layout.seed, page + 1, damage.version(page)))
    assert_found(damage, page, right, damage.read(page))


def test_what_deceives_the_guest_does_not_deceive_the_host(damage: Damage) -> None:
    """A page and its entry in the ledger, both of an earlier time: consistent, and wrong."""
    page = damage.page(2)
    stale = damage.version(page) - 1
    damage.write(page, content(damage.layout.seed, page, stale))
    struct.pack_into("<I", damage.memory, damage.layout.ledger + 4 * page, stale)
    mismatches, verified = damage.outcome()
    assert mismatches == []
    assert verified["mismatches"] >= 2


@pytest.mark.parametrize("part", ["unused", "params", "stacks", "program", "tables", "ledger"])
def test_a_flipped_byte_in_the_low_area_is_found(damage: Damage, part: str) -> None:
    layout = damage.layout
    address = {
        "unused": 9,
        "params": 2 * PAGE - 1,
        "stacks": layout.stacks + 100,
        "program": layout.tables - 1,
        "tables": layout.tables + 8 * 100,  # an entry for addresses that there are not
        "ledger": layout.ledger + 4 * layout.data_pages,
    }[part]
    damage.flip(address)
    mismatches, verified = damage.outcome()
    assert mismatches == []
    assert verified["first_wrong"]["address"] == address & -8
    assert verified["mismatches"] == 1
    assert verified["pages_verified"] == verified["pages"] - 1


def test_memory_is_compared_with_the_sources(damage: Damage) -> None:
    layout = damage.layout
    page = next(page for page in range(layout.shared_pages) if damage.version(page))
    with mmap.mmap(damage.moved.since[0], 8 << 20) as source:
        source[damage.address(page) + 8] ^= 1
    damage.memory.close()
    damage.moved.ready()
    damage.moved.destination.expect("ready")
    damage.moved.destination.expect("first-instruction")
    damage.moved.done()
    verified = damage.moved.verify()
    assert verified["mismatches"] == 1
    assert verified["pages_verified"] == verified["pages"]
    assert verified["first_wrong"]["address"] == damage.address(page) + 8
    assert damage.moved.destination.end() == EX_DATAERR


def flipped(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(lambda state: b"", "0 bytes", id="empty"),
        pytest.param(lambda state: state[:40], "40 bytes are too few", id="short"),
        pytest.param(lambda state: state[:-1], "it says", id="cut"),
        pytest.param(lambda state: state + b"x", "it says", id="long"),
        pytest.param(lambda state: flipped(state, 0), "not one of gmemd-vmm", id="magic"),
        pytest.param(lambda state: flipped(state, STATE_VERSION), "version 0", id="version"),
        pytest.param(lambda state: flipped(state, STATE_STOPPED), "damaged", id="time"),
        pytest.param(lambda state: flipped(state, len(state) - 1), "damaged", id="last-byte"),
    ],
)
def test_a_damaged_state_is_refused(
    start: Callable[..., Vmm], sockets: Sockets, spoil: Callable[[bytes], bytes], message: str
) -> None:
    moved = Guest(start, sockets, "--memory", "2M")
    moved.pause()
    moved.copy()
    moved.state = spoil(moved.state)
    moved.ready()
    assert message in moved.destination.expect("error")["message"]
    assert moved.destination.end() == EX_PROTOCOL


@pytest.mark.parametrize(
    ("arrives_as", "message"),
    [
        (["--memory", "4M"], "has 2097152 bytes of memory, --memory says 4194304"),
        (["--vcpus", "2"], "has 1 vCPUs, --vcpus says 2"),
        (["--guest", "kvm"], "is one of threads, --guest says kvm"),
    ],
)
def test_another_machine_is_refused(
    start: Callable[..., Vmm], sockets: Sockets, require_kvm: None, arrives_as: list[str], message: str
) -> None:
    moved = Guest(start, sockets, "--memory", "2M", "--guest", "threads", arrives_as=arrives_as)
    moved.pause()
    moved.ready()
    assert message in moved.destination.expect("error")["message"]
    assert moved.destination.end() == EX_CONFIG


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"error": "region 3: too short"}, "gmemd: region 3: too short"),
        ({"ready": True, "trap": "minor", "populate": "write"}, "without the guest's state"),
        ({"ready": True, "state": 1}, "without the guest's state"),
        (b"[1]", "not a JSON object"),
        (b'{"ready": true,}', "not a JSON object"),
        (None, "closed the connection"),
    ],
)
def test_a_guest_does_not_run_without_ready(
    start: Callable[..., Vmm], sockets: Sockets, answer: Event | bytes | None, message: str
) -> None:
    destination = start("destination", "--gmemd", sockets.daemon, "--migration", "m1", "--memory", "2M")
    daemon = sockets.from_destination()
    daemon.receive()
    if answer is None:
        daemon.connection.close()
    else:
        daemon.send(answer)
    assert message in destination.expect("error")["message"]
    assert destination.end() == EX_PROTOCOL


def test_errors_and_a_lost_daemon_do_not_stop_a_guest_that_runs(
    start: Callable[..., Vmm], sockets: Sockets, guest: str
) -> None:
    moved = Guest(start, sockets, "--memory", "2M", "--guest", guest)
    moved.move()
    moved.destination.expect("first-instruction")
    moved.daemon.send({"error": "no space left"})
    assert moved.destination.expect("error")["message"] == "no space left"
    moved.daemon.send({"abandoned": "by an operator"})
    assert moved.destination.expect("abandoned")["message"] == "by an operator"
    moved.daemon.connection.close()
    moved.destination.expect("disconnected")
    moved.destination.command("verify")
    moved.destination.expect("refused")
    assert moved.destination.end() == 0


def test_a_guest_goes_on_after_a_failed_migration(
    start: Callable[..., Vmm], sockets: Sockets, guest: str
) -> None:
    source = start("source", "--listen", sockets.source, "--memory", "4M", "--vcpus", "2", "--guest", guest)
    source.expect("filled")
    source.expect("running")
    sender = sockets.to_source()
    sender.ask({"gmemd": 1, "send": "m1"})
    sender.ask({"pause": True})
    steps = source.expect("paused")["steps"]
    sender.send({"error": "the destination refused", "resume": True})
    assert source.expect("failed")["message"] == "the destination refused"
    source.expect("resumed")
    sender.ask({"pause": True})
    assert all(new >= old for new, old in zip(source.expect("paused")["steps"], steps, strict=True))
    sender.send({"error": "again", "resume": True})
    source.expect("failed")
    source.expect("resumed")
    source.command("verify")
    assert_right(source.event())
    answer, _ = sender.ask({"pause": True})
    assert answer == {"error": "the guest has ended"}


def test_a_second_sender_gets_the_same(start: Callable[..., Vmm], sockets: Sockets, guest: str) -> None:
    moved = Guest(start, sockets, "--memory", "4M", "--guest", guest)
    rival = sockets.to_source()
    assert rival.receive()[0] == {"error": "another gmemd-source is connected"}
    moved.pause()
    moved.sender.connection.close()
    moved.source.expect("disconnected")
    second = sockets.to_source()
    regions, since = second.ask({"gmemd": 1, "send": "m1"})
    assert regions == moved.regions
    answer, files = second.ask({"pause": True})
    assert answer == {"paused": True, "state": 0}
    assert os.pread(files[0], 1 << 20, 0) == moved.state
    second.send({"error": "the source is to wait"})
    assert moved.source.expect("failed")["message"] == "the source is to wait"
    moved.since = since
    moved.copy()
    moved.ready()
    moved.destination.expect("ready")
    moved.destination.expect("first-instruction")
    moved.done()
    second.send({"done": True})
    moved.source.expect("done")
    assert_right(moved.verify())


def test_requests_that_a_source_cannot_serve(start: Callable[..., Vmm], sockets: Sockets) -> None:
    source = start("source", "--listen", sockets.source, "--memory", "2M")
    source.expect("filled")
    source.expect("running")
    sender = sockets.to_source()
    assert "version 1" in sender.ask({"gmemd": 2, "send": "m1"})[0]["error"]
    assert "version 1" in sender.ask({"send": "m1"})[0]["error"]
    assert "no such request" in sender.ask({"sing": True})[0]["error"]
    assert "no such request" in sender.ask({"pause": False})[0]["error"]
    sender.send(b"pause")
    assert "not a JSON object" in source.expect("disconnected")["message"]
    sockets.to_source().send(b'{"a":' + b" " * (MESSAGE_LIMIT - 6) + b"1}")
    assert "larger than the protocol allows" in source.expect("disconnected")["message"]
    assert "regions" in sockets.to_source().ask({"gmemd": 1, "send": "m1"})[0]
    source.command("dance")
    source.expect("refused")


@pytest.mark.parametrize(
    "text",
    [
        rb'{"gmemd": 1, "send": "m1", "later": {"a": [1, -2.5e3, null, false, "\u00e9\n"]}}',
        b' { "later" : [ ] , "send" : "m1" , "gmemd" : 1 } ',
        b'{"nested": {"gmemd": 2}, "gmemd": 1, "send": ""}',
    ],
)
def test_unknown_keys_are_ignored(start: Callable[..., Vmm], sockets: Sockets, text: bytes) -> None:
    source = start("source", "--listen", sockets.source, "--memory", "2M")
    source.expect("filled")
    source.expect("running")
    assert "regions" in sockets.to_source().ask(text)[0]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b'{"a"}',
        b'{"a":}',
        b'{"a":1,}',
        b'{"a":1 "b":2}',
        b'{"a":01}',
        b'{"a":+1}',
        b'{"a":1.}',
        rb'{"a":"\x"}',
        rb'{"a":"\u12g4"}',
        b'{"a":"\n"}',
        b'{"a":nil}',
        b'{"a":[1,]}',
        b'{"a":[}]',
        b'{"gmemd":1,"send":"m1"}}',
        b'{"gmemd":1,"send":"m1"}\0',
        b'{"a":' + b"[" * 30 + b"]" * 30 + b"}",
    ],
)
def test_what_is_not_json_is_refused(start: Callable[..., Vmm], sockets: Sockets, text: bytes) -> None:
    source = start("source", "--listen", sockets.source, "--memory", "2M")
    source.expect("filled")
    source.expect("running")
    sockets.to_source().send(text)
    message = source.expect("disconnected")["message"]
    assert message in ("a message is not a JSON object", "it closed the connection")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "source"),
        (["sideways"], "source"),
        (["source"], "--listen"),
        (["destination", "--gmemd", "x"], "--migration"),
        (["source", "--listen", "x", "--memory", "1Q"], "not a size"),
        (["source", "--listen", "x", "--memory", "-1M"], "not a size"),
        (["source", "--listen", "x", "--memory", "99999999T"], "not a size"),
        (["source", "--listen", "x", "--memory", "4K"], "from 1M"),
        (["source", "--listen", "x", "--memory", "1025K"], "a multiple of 4096"),
        (["source", "--listen", "x", "--memory", "3M", "--backing", "hugetlb"], "a multiple of 2097152"),
        (["source", "--listen", "x", "--vcpus", "9"], "from 1 to 8"),
        (["source", "--listen", "x", "--regions", "0"], "from 1 to 64"),
        (["source", "--listen", "x", "--backing", "paper"], "paper"),
        (["source", "--listen", "x", "--backing", "mixed"], "--regions 2"),
        (["source", "--listen", "x", "--pattern"], "lacks its value"),
        (["source", "--listen", "x", "--shiny"], "--shiny"),
        (["source", "--listen", "x", "extra"], "extra"),
        (["source", "--listen", "x" * 200], "too long"),
        (["destination", "--gmemd", "x", "--migration", "m", "--seed", "2"], "--seed is for the source"),
    ],
)
def test_usage_errors(start: Callable[..., Vmm], arguments: list[str], message: str) -> None:
    vmm = start(*arguments)
    while (event := vmm.event())["event"] != "error":
        assert event["event"] == "filled"
    assert message in event["message"]
    assert vmm.end() == EX_USAGE


def test_no_daemon(start: Callable[..., Vmm], tmp_path: Path) -> None:
    vmm = start("destination", "--gmemd", tmp_path / "none", "--migration", "m1", "--memory", "2M")
    assert "No such file" in vmm.expect("error")["message"]
    assert vmm.end() == EX_UNAVAILABLE


def test_guest_memfd_without_kvm(start: Callable[..., Vmm], sockets: Sockets) -> None:
    vmm = start("source", "--listen", sockets.source, "--backing", "guest_memfd", "--guest", "threads")
    assert "--guest kvm" in vmm.expect("error")["message"]
    assert vmm.end() == EX_UNAVAILABLE


def test_under_sanitizers(
    start: Callable[..., Vmm], sockets: Sockets, guest: str, tmp_path: Path, require_command: Any
) -> None:
    require_command("cc")
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = compile_vmm(tmp_path / "sanitized", *flags)

    def start_sanitized(*arguments: object) -> Vmm:
        return start(*arguments, program=program)

    moved = Guest(start_sanitized, sockets, "--memory", "8M", "--vcpus", "2", "--regions", "3", "--guest", guest)
    moved.move()
    moved.destination.expect("first-instruction")
    moved.done()
    moved.sender.send({"done": True})
    moved.source.expect("done")
    assert_right(moved.verify())
    assert moved.destination.end() == 0
    assert moved.source.end() == 0
