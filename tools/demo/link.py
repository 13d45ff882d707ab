"""A link between a source and a destination that misbehaves when told: a TCP relay on loopback."""

import contextlib

import trio

READ_BYTES = 256 * 1024


class Link:
    """Relays connections to a port. `cut` breaks all that there are; between `stall` and `heal` nothing passes."""

    def __init__(self, to_port: int) -> None:
        self.to_port = to_port
        self.port = 0
        self._healthy = trio.Event()
        self._healthy.set()
        self._connections: set[trio.CancelScope] = set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Relays until cancelled; `port` is where to connect."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        await trio.serve_listeners(self._relay, listeners, task_status=task_status)  # type: ignore[arg-type]

    def cut(self) -> None:
        """Every connection ends now, wherever in a frame it is."""
        for scope in self._connections:
            scope.cancel()

    def stall(self) -> None:
        """Nothing passes any more, and nobody is told."""
        self._healthy = trio.Event()

    def heal(self) -> None:
        """It passes again."""
        self._healthy.set()

    async def _relay(self, near: trio.SocketStream) -> None:
        try:
            far = await trio.open_tcp_stream("127.0.0.1", self.to_port)
        except OSError:
            await trio.aclose_forcefully(near)
            return
        async with near, far:
            with trio.CancelScope() as scope:
                self._connections.add(scope)
                try:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._pass, near, far, scope)
                        nursery.start_soon(self._pass, far, near, scope)
                finally:
                    self._connections.remove(scope)

    async def _pass(self, source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await source.receive_some(READ_BYTES):
                await self._healthy.wait()
                await sink.send_all(data)
        scope.cancel()
