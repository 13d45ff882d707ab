"""A source that a test plays."""

from collections.abc import Sequence
from typing import Self

from gmemd.migrate import wire
from support.connection import Connection, connect


class RawSource:
    """All connections of one source, without checksums, with one background lane."""

    def __init__(
        self, port: int, migration: str, regions: Sequence[Sequence[int]], *, epoch: int = 0, token: bytes = b""
    ) -> None:
        self.port = port
        self.control = connect(port)
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
        lane = connect(self.port)
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
