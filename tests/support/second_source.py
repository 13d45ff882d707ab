"""second_source.py HOST PORT MIGRATION FILE: sends a memory file as one region. Written from docs/protocol.md alone.

Any trouble on any connection ends the session, and another one goes on.
"""

import mmap
import socket
import struct
import sys
import threading
import time
from contextlib import ExitStack, suppress
from typing import Any

import msgpack

PAGE, PAGE_SHIFT = 4096, 12
PREAMBLE = b"GMEMD\0" + struct.pack("<H", 1)
HEAD = struct.Struct("<II")
FRAME = struct.Struct("<HBBHHQIII")  # all of the header but its own CRC
REQUEST, PAGES, ZERO, BEAT = 1, 2, 3, 4
HEARTBEAT, DEAD_AFTER = 0.3, 1.0
ZEROS = bytes(PAGE)
A_MESSAGE = 4096  # zero pages: 16 KiB of runs
TABLE = list(range(256))  # of the CRC-32C, reflected
for _ in range(8):
    TABLE = [value >> 1 ^ (0x82F63B78 if value & 1 else 0) for value in TABLE]


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def leb128(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + leb128(rest) if rest else bytes([low])


def code_pages(pages: list[int]) -> bytes:
    """Runs of one page each, from 0 on."""
    return b"".join(leb128(page - before - 1) + b"\1" for before, page in zip([-1, *pages], pages, strict=False))


def read_runs(at: int, code: bytes) -> set[int]:
    found, numbers, number, shift = set[int](), 0, 0, 0
    for byte in code:
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            found.update(range(at, at + number) if numbers % 2 else ())
            at, numbers, number, shift = at + number, numbers + 1, 0, 0
    return found


class Link:
    """A connection: messages, and frames once a page lane is taken."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, DEAD_AFTER)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.reader = self.socket.makefile("rb")
        self.sending = threading.Lock()
        self.expected, self.checksum = PREAMBLE, False
        self.send(PREAMBLE)

    def send(self, data: bytes) -> None:
        with self.sending:
            self.socket.sendall(data)

    def take(self, size: int) -> bytes:
        data = self.reader.read(size)
        if len(data) < size:
            raise ConnectionError("closed")
        return data

    def hear(self) -> dict[str, Any]:
        if self.take(len(self.expected)) != self.expected:
            raise SystemExit("not gmemd, or another version of it")
        self.expected = b""
        length, crc = HEAD.unpack(self.take(HEAD.size))
        body = self.take(length)
        if crc32c(body) != crc:
            raise ConnectionError("a damaged message")
        return dict(msgpack.unpackb(body))

    def say(self, kind: str, **fields: object) -> None:
        body = msgpack.packb({"type": kind} | fields)
        self.send(HEAD.pack(len(body), crc32c(body)) + body)

    def send_frame(self, kind: int, first: int = 0, pages: int = 0, payload: bytes = b"") -> None:
        crc = crc32c(payload) if self.checksum else 0
        head = FRAME.pack(0x4D47, kind, self.checksum, 0, 0, first, pages, len(payload), crc)
        self.send(head + (crc32c(head) if self.checksum else 0).to_bytes(4, "little") + payload)

    def close(self) -> None:
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class Source:
    def __init__(self, address: tuple[str, int], migration: str, memory: mmap.mmap) -> None:
        self.address, self.migration, self.memory = address, migration, memory
        self.epoch, self.token = 0, b""
        self.switched = threading.Event()  # the guest has left: before that, no page may

    def content(self, page: int) -> bytes:
        return self.memory[page * PAGE : (page + 1) * PAGE]

    def send_page(self, lane: Link, page: int) -> None:
        content = self.content(page)
        lane.send_frame(ZERO if content == ZEROS else PAGES, page, 1, b"" if content == ZEROS else content)

    def serve(self, lane: Link) -> None:
        """The urgent lane, in a thread."""
        with suppress(OSError):
            while True:
                _, kind, _, _, _, first, pages, *_ = FRAME.unpack(lane.take(32)[:28])
                self.switched.wait()
                for page in range(first, first + pages if kind == REQUEST else first):
                    self.send_page(lane, page)

    def beat(self, control: Link, *lanes: Link) -> None:
        """Signs of life, in a thread."""
        with suppress(OSError):
            while True:
                time.sleep(HEARTBEAT)
                control.say("beat")
                for lane in lanes:
                    lane.send_frame(BEAT)

    def join(self, stack: ExitStack, number: int, welcome: dict[str, Any]) -> Link:
        lane = Link(self.address)
        stack.callback(lane.close)
        lane.say("lane", migration=self.migration, epoch=welcome["epoch"], lane=number, token=welcome["token"])
        if (answer := lane.hear())["type"] != "lane-welcome":
            raise ConnectionError(answer["why"])
        lane.checksum = welcome["checksum"]
        return lane

    def session(self) -> None:
        """Returns when the destination has everything; OSError if another session is needed."""
        with ExitStack() as stack:
            control = Link(self.address)
            stack.callback(control.close)
            regions = [[0, len(self.memory) // PAGE, PAGE_SHIFT]]
            mine = {"migration": self.migration, "epoch": self.epoch, "token": self.token}
            control.say("hello", **mine, lanes=1, checksum=True, regions=regions)
            while (welcome := control.hear())["type"] == "waiting":
                pass
            if welcome["type"] == "complete" and self.switched.is_set():
                return
            if welcome["type"] != "welcome":
                raise SystemExit(welcome)
            self.epoch, self.token = welcome["epoch"], welcome["token"]
            urgent, background = self.join(stack, 0, welcome), self.join(stack, 1, welcome)
            threading.Thread(target=self.serve, args=(urgent,), daemon=True).start()
            threading.Thread(target=self.beat, args=(control, urgent, background), daemon=True).start()
            self.converse(control, background, welcome["switched"])

    def converse(self, control: Link, background: Link, switched: bool) -> None:
        missing = set(range(len(self.memory) // PAGE))
        while (message := control.hear())["type"] != "complete":
            if message["type"] in ("refused", "failed"):
                raise SystemExit(message["why"])
            if message["type"] == "received":
                missing -= read_runs(message["start"], message["runs"])
            elif message["type"] == "go":
                if not switched:
                    control.say("switch", size=0)
                switched = True
                self.switched.set()
                self.push(control, background, sorted(missing))
                missing = set(range(len(self.memory) // PAGE))

    def push(self, control: Link, background: Link, missing: list[int]) -> None:
        zero = [page for page in missing if self.content(page) == ZEROS]
        for at in range(0, len(zero), A_MESSAGE):
            control.say("zero", region=0, start=0, runs=code_pages(zero[at : at + A_MESSAGE]))
        for page in sorted(set(missing).difference(zero)):
            self.send_page(background, page)
        control.say("pushed")


def main() -> None:
    host, port, migration, path = sys.argv[1:]
    with open(path, "rb") as file:
        source = Source((host, int(port)), migration, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    while True:
        try:
            return source.session()
        except OSError:
            time.sleep(HEARTBEAT)


if __name__ == "__main__":
    main()
