"""A live daemon, and what three kinds of peer send it: real conversations, recorded, and then changed here and there.

`make fuzz-daemon`, or with ARGS the number of sessions and a seed. Afterwards the daemon must have the memory and the
descriptors that it had before, and serve a migration.
"""

import json
import random
import select
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from support.connection import Connection, connect
from support.daemon import DaemonProcess
from support.polling import PATIENCE, eventually
from support.source import SourceProcess, guest_content
from support.vmm import PAGE, Vmm

from gmemd.errors import GmemdError, LinkError
from gmemd.migrate import wire
from gmemd.native import crc32c

PAGES = 40
SESSIONS, SEED = 10_000, 1
# Seconds that a session waits for a daemon that answers nothing: it is on the same machine, and has little to do.
ANSWER = 0.1
WARM_UP = 100  # sessions, until the daemon's caches are what they will be
GROWTH_KIB = 3 << 10
EDGES = [n.to_bytes(8, "little") for n in (0, 1, 0x7F, 0xFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)]
# A short time to say hello, and little state, so that the limits are met.
SETTINGS = """handshake_timeout = 1.0
[limits]
state = "64K"
regions = 4
"""


@dataclass(frozen=True)
class Recording:
    """What one source sent: its hello and what followed, and each page lane's frames."""

    hello: wire.Hello
    control: list[wire.Message]
    lanes: dict[int, bytes]


class Recorder:
    """Relays one source's connections to a daemon, and keeps what the source sends."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._sent: dict[socket.socket, bytearray] = {}
        self._other: dict[socket.socket, socket.socket] = {}

    def relay_until(self, over: SourceProcess) -> Recording:
        while over.process.poll() is None:
            for sock in select.select([self._listener, *self._other], [], [], 0.01)[0]:
                self._accept() if sock is self._listener else self._pass_on(sock)
        for sock in [self._listener, *self._other]:
            sock.close()
        return _sort(map(bytes, self._sent.values()))

    def _accept(self) -> None:
        source, _ = self._listener.accept()
        far = socket.create_connection(("127.0.0.1", self._to))
        self._other |= {source: far, far: source}
        self._sent[source] = bytearray()

    def _pass_on(self, sock: socket.socket) -> None:
        with suppress(ConnectionError):
            if data := sock.recv(1 << 16):
                self._other[sock].sendall(data)
                if sock in self._sent:
                    self._sent[sock] += data
                return
        far = self._other.pop(sock)
        with suppress(OSError):
            far.shutdown(socket.SHUT_WR)
        if far not in self._other:
            sock.close()
            far.close()


def _sort(connections: Iterator[bytes]) -> Recording:
    control: list[wire.Message] = []
    lanes = {}
    for data in connections:
        decoder = wire.Decoder("source")
        at = 0
        while at < len(data):
            step = decoder.wanted
            decoder.receive(data[at : at + step])
            at += step
            message = decoder.next_message_untrusted()
            if isinstance(message, wire.LaneHello):
                lanes[message.lane] = data[at:]
                break
            if message and not isinstance(message, wire.Beat):
                control.append(message)
    hello = control.pop(0)
    assert isinstance(hello, wire.Hello)
    return Recording(hello, control, lanes)


def record(daemon: DaemonProcess, content: bytes, folder: Path) -> Recording:
    """A good migration's source."""
    (folder / "memory").write_bytes(content)
    recorder = Recorder(daemon.port)
    with (
        Vmm(len(content)) as vmm,
        SourceProcess(recorder.port, "recorded", "--file", folder / "memory", options=("--no-checksum",)) as source,
    ):
        vmm.hand_off(daemon.socket, "recorded")
        recording = recorder.relay_until(source)
        vmm.expect("ready")
        vmm.expect("done")
    daemon.ended("recorded")
    return recording


def changed(rng: random.Random, data: bytes) -> bytes:
    """One to four changes."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, run = rng.randint(0, len(out)), rng.randint(1, 40)
        match rng.randrange(7):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at : at + 8] = rng.choice(EDGES)
            case 2:
                del out[at : at + run]
            case 3:
                out[at:at] = rng.randbytes(run)
            case 4:
                out[at:at] = out[at : at + rng.randint(1, 5000)]
            case 5:
                del out[at:]
            case _:
                out[at : at + 1] = rng.randbytes(1)
    return bytes(out)


class Attack:
    """Peers of one daemon, with one VMM at a time that waits for a source."""

    def __init__(self, daemon: DaemonProcess, recording: Recording, seed: int) -> None:
        self.daemon = daemon
        self.recording = recording
        self.rng = random.Random(seed)
        self.vmm: Vmm | None = None
        self._name = ""
        self._names = 0

    def session(self) -> None:
        kinds = (self.bad_source, self.bad_vmm, self.bad_caller)
        self.rng.choices(kinds, (80, 15, 5))[0]()

    def close(self) -> None:
        if self.vmm:
            self.vmm.close()
            with suppress(GmemdError):  # it may have ended
                self.daemon.abandon(self._name)
            self.daemon.ended(self._name)
        self.vmm = None

    def bad_source(self) -> None:
        """A session in which some bytes are not as they were."""
        self._have_a_vmm()
        parts: list[str | int] = ["hello", "lane hello", "control", *self.recording.lanes]
        wrong = self.rng.sample(parts, k=self.rng.choice((1, 1, 1, 2)))
        control = connect(self.daemon.port)
        lanes: list[Connection] = []
        with suppress(LinkError, OSError, AssertionError):
            self._play(control, lanes, wrong)
        for connection in (control, *lanes):
            connection.close()
        self._see_whether_it_is_over()

    def _play(self, control: Connection, lanes: list[Connection], wrong: list[str | int]) -> None:
        hello = replace(self.recording.hello, migration=self._name)
        self._send(control, [hello], "hello" in wrong)
        control.socket.settimeout(ANSWER if "hello" in wrong else PATIENCE)
        welcome = control.expect(wire.Welcome)
        for number in self.recording.lanes:
            lane = connect(self.daemon.port)
            lanes.append(lane)
            greeting = wire.LaneHello(self._name, welcome.epoch, number, welcome.token)
            self._send(lane, [greeting], "lane hello" in wrong)
            lane.socket.settimeout(ANSWER if "lane hello" in wrong else PATIENCE)
            lane.expect(wire.LaneWelcome)
        while not isinstance(control.receive(), wire.Go):
            pass
        self._send(control, self.recording.control, "control" in wrong)
        for lane, (number, frames) in zip(lanes, self.recording.lanes.items(), strict=True):
            lane.socket.sendall(changed(self.rng, frames) if number in wrong else frames)
        control.socket.settimeout(ANSWER)
        control.expect(wire.Complete)

    def _send(self, connection: Connection, messages: list[wire.Message], wrong: bool) -> None:
        """Wrong is either the stream, or what is in one message whose length and checksum are right."""
        data = connection.coded(*messages)
        if wrong and self.rng.random() < 0.5:
            data = changed(self.rng, data)
        elif wrong:
            bodies = [wire.encode(message)[wire.HEAD.size :] for message in messages]
            index = self.rng.randrange(len(bodies))
            bodies[index] = changed(self.rng, bodies[index])
            begin = data[: len(data) - len(b"".join(map(wire.encode, messages)))]
            data = begin + b"".join(wire.HEAD.pack(len(body), crc32c(body)) + body for body in bodies)
        connection.socket.sendall(data)

    def bad_vmm(self) -> None:
        """A hand-off that is not in order, with more or fewer descriptors."""
        with Vmm(PAGES * PAGE) as vmm:
            vmm.socket.settimeout(ANSWER)
            vmm.connect(self.daemon.socket)
            name = self._next_name()
            message = json.dumps({"gmemd": 1, "receive": name, "regions": vmm.regions}).encode()
            fds = [*vmm.files, vmm.uffd]
            if self.rng.random() < 0.3:
                fds = self.rng.choices([*fds, vmm.socket.fileno()], k=self.rng.randint(0, 5))
            with suppress(OSError, ValueError):
                vmm.send(changed(self.rng, message), fds)
                if vmm.receive() == {}:
                    return
                vmm.send(changed(self.rng, b'{"discard": [[0, 0, 1], [0, 5, 7]]}'))
                vmm.receive()
        for migration in self.daemon.status()["migrations"]:  # one whose hand-off was in order after all
            if migration["migration"] != self._name:
                with suppress(GmemdError):
                    self.daemon.abandon(migration["migration"])

    def bad_caller(self) -> None:
        """On the status socket."""
        with socket.socket(socket.AF_UNIX) as sock, suppress(OSError):
            sock.settimeout(ANSWER)
            sock.connect(str(self.daemon.status_socket))
            sock.sendall(changed(self.rng, b'{"command": "abandon", "migration": "nobody"}\n'))
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):
                pass

    def _next_name(self) -> str:
        self._names += 1
        return f"m{self._names}"

    def _have_a_vmm(self) -> None:
        if self.vmm is None:
            self._name = self._next_name()
            self.vmm = Vmm(PAGES * PAGE).hand_off(self.daemon.socket, self._name)
            eventually(lambda: any(m["migration"] == self._name for m in self.daemon.status()["migrations"]))

    def _see_whether_it_is_over(self) -> None:
        """Now and then the guest is another one, even if the migration could go on."""
        if all(m["migration"] != self._name for m in self.daemon.status()["migrations"]) or self.rng.random() < 0.1:
            self.close()


def good_migration(daemon: DaemonProcess, content: bytes, folder: Path, name: str) -> None:
    """A guest that reads all of its memory while it comes."""
    (folder / "memory").write_bytes(content)
    with (
        Vmm(len(content)) as vmm,
        SourceProcess(daemon.port, name, "--file", folder / "memory") as source,
    ):
        vmm.hand_off(daemon.socket, name).expect("ready")
        assert vmm.read(0, pages=len(content) // PAGE) == content
        vmm.expect("done")
        assert source.result().code == 0
    daemon.ended(name)


@dataclass(frozen=True)
class Outcome:
    sessions: int
    seconds: float
    growth_kib: int
    descriptors: int  # more than before


def attack(folder: Path, sessions: int, seed: int) -> Outcome:
    """All of it. Fails if the daemon serves no good migration afterwards, or ends in any way but ours."""
    content = guest_content(random.Random(seed), PAGES)
    begin = time.monotonic()
    with DaemonProcess(folder, SETTINGS) as daemon:
        attack = Attack(daemon, record(daemon, content, folder), seed)
        for _ in range(min(WARM_UP, sessions // 2)):
            attack.session()
        attack.close()
        good_migration(daemon, content, folder, "before")
        memory, descriptors = daemon.memory_kib()["RssAnon"], sum(daemon.descriptors().values())
        for _ in range(sessions - min(WARM_UP, sessions // 2)):
            attack.session()
        attack.close()
        good_migration(daemon, content, folder, "after")
        eventually(lambda: sum(daemon.descriptors().values()) <= descriptors or None, PATIENCE)
        growth = daemon.memory_kib()["RssAnon"] - memory
        more = sum(daemon.descriptors().values()) - descriptors
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log.read_text(), daemon.log.read_text()
    return Outcome(sessions, time.monotonic() - begin, growth, more)


def main() -> int:
    sessions, seed = [*map(int, sys.argv[1:]), *(SESSIONS, SEED)[len(sys.argv) - 1 :]]
    with tempfile.TemporaryDirectory(prefix="gmemd-fuzz-") as folder:
        outcome = attack(Path(folder), sessions, seed)
    print(
        f"{outcome.sessions} sessions in {outcome.seconds:.0f} s: memory grew by {outcome.growth_kib} KiB, "
        f"descriptors by {outcome.descriptors}; a good migration came through"
    )
    return int(outcome.growth_kib > GROWTH_KIB or outcome.descriptors > 0)


if __name__ == "__main__":
    sys.exit(main())
