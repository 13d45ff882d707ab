"""Plays what stands around a gmemd-vmm: gmemd-source, the daemon, and the copying of memory between the two."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import select
import socket
import struct
import subprocess
from typing import TYPE_CHECKING, Any

from support.pace import SLOWER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

PAGE = 4096
PATIENCE = 60.0 * SLOWER  # seconds; nothing here takes a tenth of it
MESSAGE_LIMIT = 128 << 10

EX_USAGE, EX_DATAERR, EX_UNAVAILABLE, EX_PROTOCOL, EX_CONFIG = 64, 65, 69, 76, 78

Event = dict[str, Any]


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
        words: tuple[int, ...] = struct.unpack_from("<19Q", memory, PAGE)
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
