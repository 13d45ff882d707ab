"""A way between a source and a daemon on which one connection breaks, or stands still, at a chosen byte."""

from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from enum import Enum
from typing import NamedTuple

import trio

from gmemd.migrate import wire

READ_BYTES = 64 * 1024
Listeners = list[trio.SocketListener]


class Way(Enum):
    """Directions, as seen from the source."""

    UP = "up"
    DOWN = "down"


class Fault(NamedTuple):
    """What happens to the first connection of a lane that passes so many bytes one way, the last of them included.

    `lane` is "control", or the number of a page lane. `act` is called then; the connection breaks, or with `stall`
    passes nothing any more.
    """

    lane: str | int
    way: Way
    byte: int
    stall: bool = False
    act: Callable[[], Awaitable[None]] | None = None


class Proxy:
    """Relays to a port of this host. `passed` counts bytes by lane and way, `happened` says that the fault has."""

    def __init__(self, port: int, fault: Fault | None = None) -> None:
        self._to = port
        self._fault = fault
        self.port = 0
        self.passed: Counter[tuple[str | int, Way]] = Counter()
        self.happened = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[Listeners] = trio.TASK_STATUS_IGNORED) -> None:
        """Relays until cancelled."""
        listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
        self.port = listener.socket.getsockname()[1]
        await trio.serve_listeners(self._relay, [listener], task_status=task_status)

    async def _relay(self, source: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            async with source, await trio.open_tcp_stream("127.0.0.1", self._to) as destination:
                begin, lane = await _lane_of(source)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pass, begin, source, destination, lane, Way.UP, nursery.cancel_scope)
                    nursery.start_soon(self._pass, b"", destination, source, lane, Way.DOWN, nursery.cancel_scope)

    async def _pass(
        self,
        begin: bytes,
        near: trio.SocketStream,
        far: trio.SocketStream,
        lane: str | int,
        way: Way,
        both_ways: trio.CancelScope,
    ) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            passed = 0
            while data := begin or await near.receive_some(READ_BYTES):
                begin = b""
                fault = self._due(lane, way, passed + len(data))
                data = data[: fault.byte - passed] if fault else data
                await far.send_all(data)
                passed += len(data)
                self.passed[lane, way] += len(data)
                if fault:
                    await self._break(fault)
                    break
        both_ways.cancel()

    def _due(self, lane: str | int, way: Way, reached: int) -> Fault | None:
        fault = self._fault
        if fault is None or self.happened.is_set() or (fault.lane, fault.way) != (lane, way) or reached < fault.byte:
            return None
        return fault

    async def _break(self, fault: Fault) -> None:
        self.happened.set()
        if fault.act:
            await fault.act()
        if fault.stall:
            await trio.sleep_forever()


async def _lane_of(source: trio.SocketStream) -> tuple[bytes, str | int]:
    """What has come so far, and the lane that it says it is."""
    decoder, begin = wire.Decoder("source"), b""
    while (hello := decoder.next_message_untrusted()) is None:
        data = await source.receive_some(decoder.wanted)
        if not data:
            raise trio.ClosedResourceError
        decoder.receive(data)
        begin += data
    return begin, hello.lane if isinstance(hello, wire.LaneHello) else "control"
