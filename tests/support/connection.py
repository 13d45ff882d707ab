"""One connection between a source and a destination, message by message, so that it can do wrong."""

import socket
import struct
from typing import TypeVar

from gmemd.errors import LinkError
from gmemd.migrate import wire
from support.polling import PATIENCE

M = TypeVar("M", bound=wire.Message)

FRAME = struct.Struct("<HBBHHQIIII")
FRAME_MAGIC = 0x4D47
REQUEST, PAGES, ZERO, BEAT = 1, 2, 3, 4


def frame(kind: int, region: int, first: int, count: int, payload: bytes = b"") -> bytes:
    """A frame without a checksum."""
    return FRAME.pack(FRAME_MAGIC, kind, 0, region, 0, first, count, len(payload), 0, 0) + payload


class Connection:
    """The end of one connection. `peer` is who has the other."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.socket = sock
        self.socket.settimeout(PATIENCE)
        self._decoder = wire.Decoder(peer)
        self._preamble = wire.preamble()

    def coded(self, *messages: wire.Message) -> bytes:
        """What `send` would send."""
        preamble, self._preamble = self._preamble, b""
        return preamble + b"".join(map(wire.encode, messages))

    def send(self, *messages: wire.Message) -> None:
        self.socket.sendall(self.coded(*messages))

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

    def read_frame(self) -> tuple[int, int, int, int, bytes]:
        """The next frame that is no mere sign of life: kind, region, first page, count, payload."""
        while True:
            _, kind, _, region, _, first, count, length, *_ = FRAME.unpack(self._read_all(FRAME.size))
            payload = self._read_all(length)
            if kind != BEAT:
                return kind, region, first, count, payload

    def _read_all(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += self._read(size - len(data))
        return data

    def _read(self, size: int) -> bytes:
        try:
            data = self.socket.recv(size)
        except ConnectionResetError:
            data = b""
        if not data:
            raise LinkError("hung up")
        return data

    def close(self) -> None:
        self.socket.close()


def connect(port: int) -> Connection:
    """A source's end."""
    return Connection(socket.create_connection(("127.0.0.1", port), PATIENCE), "destination")
