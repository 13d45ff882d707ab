"""A link between a source and a destination that misbehaves when told: a TCP relay on loopback."""

import contextlib
from collections.abc import Callable

import trio

READ_BYTES = 256 * 1024


class Link:
    """Relays connections to a port. `cut` breaks all that there are; between `stall` and `heal` nothing passes;
    `go_silent` has nothing more pass on those that there are, for ever, and tells nobody."""

    def __init__(self, to_port: int) -> None:
        self.to_port = to_port
        self.port = 0
        self.passed = 0  # bytes, on all connections, both ways
        self._healthy = trio.Event()
        self._healthy.set()
        self._connections: set[_Connection] = set()
        self._due: list[tuple[int, Callable[[], None]]] = []

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Relays until cancelled; `port` is where to connect."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        await trio.serve_listeners(self._relay, listeners, task_status=task_status)  # type: ignore[arg-type]

    def at(self, byte: int, act: Callable[[], None]) -> None:
        """Calls `act` when so many bytes have passed, not one more."""
        self._due = sorted([*self._due, (byte, act)], key=lambda due: due[0])

    def cut(self) -> None:
        """Every connection ends now, wherever in a frame it is."""
        for connection in self._connections:
            connection.scope.cancel()

    def stall(self) -> None:
        """Nothing passes any more, and nobody is told."""
        self._healthy = trio.Event()

    def heal(self) -> None:
        """It passes again."""
        self._healthy.set()

    def go_silent(self) -> None:
        """As when a router forgets these connections: new ones pass."""
        for connection in self._connections:
            connection.silent = True

    async def _relay(self, near: trio.SocketStream) -> None:
        try:
            far = await trio.open_tcp_stream("127.0.0.1", self.to_port)
        except OSError:
            await trio.aclose_forcefully(near)
            return
        async with near, far:
            connection = _Connection()
            with connection.scope:
                self._connections.add(connection)
                try:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._pass, connection, near, far)
                        nursery.start_soon(self._pass, connection, far, near)
                finally:
                    self._connections.remove(connection)

    async def _pass(self, connection: "_Connection", source: trio.SocketStream, sink: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await source.receive_some(READ_BYTES):
                while data:
                    data = await self._pass_some(connection, data, sink)
        await self._wait_if_silent(connection)
        connection.scope.cancel()

    async def _pass_some(self, connection: "_Connection", data: bytes, sink: trio.SocketStream) -> bytes:
        """Passes what comes before the next act on, then acts. Returns the rest."""
        await self._wait_if_silent(connection)
        most = self._due[0][0] - self.passed if self._due else len(data)
        now, rest = data[:most], data[most:]
        self.passed += len(now)
        await sink.send_all(now)
        while self._due and self._due[0][0] <= self.passed:
            self._due.pop(0)[1]()
        return rest

    async def _wait_if_silent(self, connection: "_Connection") -> None:
        await self._healthy.wait()
        if connection.silent:
            await trio.sleep_forever()


class _Connection:
    """What is common to both ways of one."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.silent = False
