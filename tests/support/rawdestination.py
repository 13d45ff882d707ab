"""A destination that a test plays."""

import socket
from typing import Self

from gmemd.migrate import wire
from support.connection import PAGES, REQUEST, Connection, frame
from support.polling import PATIENCE
from support.vmm import PAGE


class RawDestination:
    """Listens for one source, and takes its connections one by one. Checksums are off."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(PATIENCE)
        self.port: int = self._listener.getsockname()[1]
        self.connections: list[Connection] = []
        self.lanes: dict[int, Connection] = {}

    def accept(self) -> Connection:
        connection = Connection(self._listener.accept()[0], "source")
        self.connections.append(connection)
        return connection

    def greet(self, *, epoch: int = 1, switched: bool = False) -> wire.Hello:
        """Takes a control lane, and welcomes its source. Lanes of a session that is over are turned away."""
        while True:
            self.control = self.accept()
            hello = self.control.receive()
            if isinstance(hello, wire.Hello):
                break
            self.control.close()
        self.token = bytes([epoch]) * wire.TOKEN_BYTES
        self.control.send(wire.Welcome(epoch, self.token, False, switched))
        return hello

    def take_lanes(self, count: int) -> None:
        """The urgent lane and `count` background lanes, in whatever order they come."""
        self.lanes = {}
        for _ in range(count + 1):
            lane = self.accept()
            hello = lane.expect(wire.LaneHello)
            assert hello.token == self.token
            self.lanes[hello.lane] = lane
            lane.send(wire.LaneWelcome())

    def join(self, *, epoch: int = 1, switched: bool = False, received: tuple[wire.Received, ...] = ()) -> wire.Hello:
        """Up to "go"."""
        hello = self.greet(epoch=epoch, switched=switched)
        self.take_lanes(hello.lanes)
        self.control.send(*received, wire.Go())
        return hello

    def take_switch(self) -> bytes:
        """The VMM's own state, as far as "switch"."""
        state = b""
        while isinstance(message := self.control.receive(), wire.State):
            state += message.piece
        assert message == wire.Switch(len(state))
        return state

    def take_pages(self, lane: int, until: int) -> dict[int, bytes]:
        """Pages of region 0 from a lane, by number, as many as `until`."""
        pages: dict[int, bytes] = {}
        while len(pages) < until:
            kind, region, first, count, payload = self.lanes[lane].read_frame()
            assert region == 0
            content = payload if kind == PAGES else bytes(count * PAGE)
            for page in range(count):
                pages[first + page] = content[page * PAGE :][:PAGE]
        return pages

    def ask(self, page: int) -> bytes:
        """Asks for a page on the urgent lane."""
        self.lanes[0].socket.sendall(frame(REQUEST, 0, page, 1))
        return self.take_pages(0, 1)[page]

    def until_failed(self) -> str:
        """Why the source gave up, once it has."""
        while not isinstance(message := self.control.receive(), wire.Failed):
            pass
        self.hang_up()
        return message.why

    def hang_up(self) -> None:
        """On all connections."""
        while self.connections:
            self.connections.pop().close()

    def close(self) -> None:
        self._listener.close()
        self.hang_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
