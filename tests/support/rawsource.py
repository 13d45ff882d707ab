"""A source, message by message and frame by frame, so that it can do wrong."""

import socket
import struct
from collections.abc import Sequence
from typing import Self, TypeVar

from gmemd.errors import LinkError
from gmemd.migrate import wire
from support.polling import PATIENCE

M = TypeVar("M", bound=wire.Message)

FRAME = struct.Struct("<HBBHHQIIII")
FRAME_MAGIC = 0x4D47
REQUEST, PAGES, ZERO, BEAT = 1, 2, 3, 4


def frame(kind: int, region: int, first: int, count: int, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """A frame without a checksum."""
    length = len(payload) if length is None else length
    return FRAME.pack(FRAME_MAGIC, kind, 0, region, 0, first, count, length, 0, 0) + payload


class Connection:
    """One connection to a daemon."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self._decoder = wire.Decoder("destination")
        self._preamble = wire.preamble()

    def send(self, *messages: wire.Message) -> None:
        preamble, self._preamble = self._preamble, b""
        self.socket.sendall(preamble + b"".join(map(wire.encode, messages)))

    def receive(self) -> wire.Message:
        """The next message that is no mere sign of life; LinkError at the end."""
        while True:
            while (message := self._decoder.next_message_untrusted()) is None:
                self._decoder.receive(self._read(self._decoder.wanted))
            if not isinstance(message, wire.Beat):
                return message

    def expect(self, kind: type[M]) -> M:
        message = self.receive()
        assert isinstance(message, kind), message
        return message

    def read_frame(self) -> tuple[int, int, int, int]:
        """The next request: kind, region, first page, count."""
        while True:
            data = b""
            while len(data) < FRAME.size:
                data += self._read(FRAME.size - len(data))
            _, kind, _, region, _, first, count, *_ = FRAME.unpack(data)
            if kind != BEAT:
                return kind, region, first, count

    def _read(self, size: int) -> bytes:
        try:
            data = self.socket.recv(size)
        except ConnectionResetError:
            data = b""
        if not data:
            raise LinkError("the daemon hung up")
        return data

    def close(self) -> None:
        self.socket.close()


class RawSource:
    """All connections of one source, without checksums, with one background lane."""

    def __init__(
        self, port: int, migration: str, regions: Sequence[Sequence[int]], *, epoch: int = 0, token: bytes = b""
    ) -> None:
        self.port = port
        self.control = Connection(port)
        self.lanes: list[Connection] = []
        self.hello = wire.Hello(migration, epoch, token, 1, False, [list(region) for region in regions])

    def greet(self) -> wire.Welcome:
        self.control.send(self.hello)
        while isinstance(message := self.control.receive(), wire.Waiting):
            pass
        assert isinstance(message, wire.Welcome), message
        self.welcome = message
        return message

    def open_lane(self, number: int) -> Connection:
        lane = Connection(self.port)
        self.lanes.append(lane)
        lane.send(wire.LaneHello(self.hello.migration, self.welcome.epoch, number, self.welcome.token))
        lane.expect(wire.LaneWelcome)
        return lane

    def join(self) -> Self:
        """Up to "go": what is received already is passed over."""
        self.greet()
        self.urgent, self.background = self.open_lane(0), self.open_lane(1)
        while not isinstance(message := self.control.receive(), wire.Go):
            assert isinstance(message, wire.Received), message
        return self

    def switch(self, state: bytes = b"") -> Self:
        if state:
            self.control.send(wire.State(state))
        self.control.send(wire.Switch(len(state)))
        return self

    def close(self) -> None:
        for connection in (self.control, *self.lanes):
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
