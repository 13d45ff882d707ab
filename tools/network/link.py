"""A link between a source and a destination that misbehaves when told: a TCP relay on loopback."""

import contextlib
import random
import socket
import struct
from collections.abc import Callable
from enum import Enum

import trio

from gmemd_tools.network.conditions import Conditions

READ_BYTES = 256 * 1024
# With a rate, a connection gets the line for about so long at a time; a line that was idle makes up for less.
TURN_SECONDS = 0.002
SMALLEST_TURN = 4096
# Pieces of one connection that are on their way: 16 MiB at the most.
IN_FLIGHT = 256
FLIGHT_BYTES = 64 * 1024
BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError)
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: no time to say goodbye


class Way(Enum):
    """Directions, as seen from the source."""

    UP = "up"
    DOWN = "down"


class Link:
    """Relays connections to a port. `cut` breaks all that there are; between `stall` and `heal` nothing passes;
    `go_silent` has nothing more pass on those that there are, for ever, and tells nobody."""

    def __init__(self, to_port: int, conditions: Conditions | None = None) -> None:
        self.to_port = to_port
        self.port = 0
        self.passed = 0  # bytes, on all connections, both ways
        self.used = trio.Event()  # somebody has connected
        self._conditions = conditions or Conditions()
        self._random = random.Random(f"link {self._conditions.seed}")
        self._free_at = dict.fromkeys(Way, 0.0)  # with a rate: when the line will be
        self._healthy = trio.Event()
        self._healthy.set()
        self._connections: set[_Connection] = set()
        self._due: list[tuple[int, Callable[[], None]]] = []
        self._spoil: Callable[[bytes], bytes] | None = None  # what becomes of the next bytes
        self._truncate = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Relays until cancelled; `port` is where to connect."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        await trio.serve_listeners(self._relay, listeners, task_status=task_status)  # type: ignore[arg-type]

    def at(self, byte: int, act: Callable[[], None]) -> None:
        """Calls `act` when so many bytes have passed, not one more."""
        self._due = sorted([*self._due, (byte, act)], key=lambda due: due[0])

    def cut(self) -> None:
        """Every connection is reset now, wherever in a frame it is."""
        for connection in self._connections:
            connection.reset()

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

    def corrupt(self, count: int) -> None:
        """In the next bytes that pass, so many have a bit turned over."""
        self._spoil = lambda data: _corrupted(data, count, self._random)

    def lose(self, count: int) -> None:
        """Of the next bytes that pass, so many do not arrive, and those behind them do."""
        self._spoil = lambda data: _without(data, count, self._random)

    def truncate(self) -> None:
        """A part of the next bytes arrives, and then the connection ends in good order."""
        self._truncate = True

    async def _relay(self, near: trio.SocketStream) -> None:
        self.used.set()
        await trio.sleep(self._conditions.reorder * self._random.random())
        try:
            far = await trio.open_tcp_stream("127.0.0.1", self.to_port)
        except OSError:
            await trio.aclose_forcefully(near)
            return
        async with near, far:
            connection = _Connection(near, far)
            with connection.scope:
                self._connections.add(connection)
                try:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._pass, connection, near, far, Way.UP)
                        nursery.start_soon(self._pass, connection, far, near, Way.DOWN)
                finally:
                    self._connections.remove(connection)

    async def _pass(
        self, connection: "_Connection", source: trio.SocketStream, sink: trio.SocketStream, way: Way
    ) -> None:
        """An end of the stream is passed on, too; whatever else ends one way ends the other."""
        try:
            if self._conditions.shaped:
                await self._pass_late(connection, source, sink, way)
            else:
                while data := await source.receive_some(READ_BYTES):
                    await self._pass_all(connection, data, sink)
            await self._wait_if_silent(connection)
            await sink.send_eof()
        except BROKEN:
            await self._wait_if_silent(connection)
            connection.scope.cancel()

    async def _pass_late(
        self, connection: "_Connection", source: trio.SocketStream, sink: trio.SocketStream, way: Way
    ) -> None:
        """Each piece when the line was free for it and it has travelled. None overtakes another of its connection."""
        send, arrive = trio.open_memory_channel[tuple[float, bytes]](IN_FLIGHT)

        async def travel() -> None:
            due = 0.0
            with send, contextlib.suppress(*BROKEN):
                while data := await source.receive_some(self._turn_bytes()):
                    sent = await self._line(way, len(data))
                    due = max(due, sent + self._travel_seconds())
                    await send.send((due, data))

        broken = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(travel)
            try:
                async for due, data in arrive:
                    await trio.sleep_until(due)
                    await self._pass_all(connection, data, sink)
            except BROKEN:
                broken = True
                nursery.cancel_scope.cancel()
        if broken:
            raise trio.BrokenResourceError

    def _turn_bytes(self) -> int:
        if not self._conditions.rate:
            return FLIGHT_BYTES
        return max(SMALLEST_TURN, min(FLIGHT_BYTES, int(self._conditions.rate * TURN_SECONDS)))

    def _travel_seconds(self) -> float:
        return self._conditions.latency + self._conditions.jitter * self._random.random()

    async def _line(self, way: Way, count: int) -> float:
        """Waits until so many bytes have been put on the line. Returns when that was, in trio's time."""
        now = trio.current_time()
        if not self._conditions.rate:
            return now
        begin = max(self._free_at[way], now - TURN_SECONDS)
        self._free_at[way] = begin + count / self._conditions.rate
        await trio.sleep_until(self._free_at[way])
        return max(now, self._free_at[way])

    async def _pass_all(self, connection: "_Connection", data: bytes, sink: trio.SocketStream) -> None:
        while data:
            data = await self._pass_some(connection, data, sink)

    async def _pass_some(self, connection: "_Connection", data: bytes, sink: trio.SocketStream) -> bytes:
        """Passes what comes before the next act on, then acts. Returns the rest."""
        await self._wait_if_silent(connection)
        most = self._due[0][0] - self.passed if self._due else len(data)
        now, rest = data[:most], data[most:]
        self.passed += len(now)
        truncate, self._truncate = self._truncate, False
        arrives = self._spoilt(now)
        await sink.send_all(arrives[: self._random.randrange(len(arrives) + 1)] if truncate else arrives)
        if truncate:
            connection.scope.cancel()
        while self._due and self._due[0][0] <= self.passed:
            self._due.pop(0)[1]()
        return rest

    def _spoilt(self, data: bytes) -> bytes:
        """What becomes of these bytes."""
        spoil, self._spoil = self._spoil, None
        return spoil(data) if spoil else data

    async def _wait_if_silent(self, connection: "_Connection") -> None:
        await self._healthy.wait()
        if connection.silent:
            await trio.sleep_forever()


class _Connection:
    """What is common to both ways of one."""

    def __init__(self, *streams: trio.SocketStream) -> None:
        self.scope = trio.CancelScope()
        self.silent = False
        self._streams = streams

    def reset(self) -> None:
        for stream in self._streams:
            with contextlib.suppress(OSError):
                stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.scope.cancel()


def _corrupted(data: bytes, count: int, rng: random.Random) -> bytes:
    spoilt = bytearray(data)
    for _ in range(count):
        spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
    return bytes(spoilt)


def _without(data: bytes, count: int, rng: random.Random) -> bytes:
    at = rng.randrange(max(1, len(data) - count + 1))
    return data[:at] + data[at + count :]
