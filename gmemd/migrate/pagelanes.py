"""The source's page lanes of one session: each connects, works, and connects again when its connection fails."""

import logging
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import trio

from gmemd.errors import LinkError, UntrustedError
from gmemd.migrate import wire
from gmemd.migrate.link import LinkSettings, MessageStream, connect, expect
from gmemd.migrate.state import Role
from gmemd.migrate.tasks import open_tasks
from gmemd.native.source import Push, PushState, Server, Source

if TYPE_CHECKING:
    from gmemd.migrate.source import Destination

log = logging.getLogger(__name__)
T = TypeVar("T")

URGENT = 0
# A push returns to the event loop after this long, to be cancelled if need be.
STEP_US = 20_000
FIRST_PAUSE = 0.02
LONGEST_PAUSE = 0.5
# A lane that has worked for so long comes back at once; one that fails sooner, less and less often.
STEADY_SECONDS = 1.0
JITTER = 0.5


class PageLanes:
    """The urgent lane and the background lanes."""

    def __init__(self, source: Source, to: "Destination", welcome: wire.Welcome, settings: LinkSettings) -> None:
        self.source = source
        self.to = to
        self.welcome = welcome
        self.settings = settings
        self._server: Server | None = None
        self._threads = trio.CapacityLimiter(to.lanes + 1)
        self._turn = trio.Condition()
        self._round = 0  # grows with every push
        self._pushed: dict[int, int] = dict.fromkeys(range(1, to.lanes + 1), 0)  # lane → round that it has ended

    async def run(self) -> None:
        """Keeps all lanes connected until cancelled."""
        async with open_tasks() as tasks:
            for lane in range(self.to.lanes + 1):
                tasks.start(self._keep, lane)

    async def push(self) -> None:
        """Sends all that is still to be sent; returns when every background lane has sent its part."""
        async with self._turn:
            self._round += 1
            self._turn.notify_all()
            while any(ended < self._round for ended in self._pushed.values()):
                await self._turn.wait()

    async def beat(self) -> None:
        """Says on the urgent lane that we are alive, and finds out whether the destination is."""
        if server := self._server:
            server.beat()
            silent = (time.monotonic_ns() - server.heard_ns) / 1e9
            if silent > self.settings.dead_after:
                log.info("urgent lane: silent for %.1f s", silent)
                server.stop()

    async def _keep(self, lane: int) -> None:
        pause = 0.0
        while True:
            try:
                timeout = self.settings.handshake_timeout
                messages = await connect(self.to.host, self.to.port, timeout, self.to.secured)
                async with messages.stream:
                    await self._join(lane, messages)
                    joined = time.monotonic()
                    try:
                        await (self._serve(messages) if lane == URGENT else self._push_on(lane, messages))
                    finally:
                        if time.monotonic() - joined > STEADY_SECONDS:
                            pause = 0.0
            except (LinkError, UntrustedError) as error:  # of the latter, the control lane tells
                log.info("%s", error, extra={"lane": lane})
            await trio.sleep(pause * random.uniform(1 - JITTER, 1))
            pause = min(LONGEST_PAUSE, max(FIRST_PAUSE, 2 * pause))

    async def _join(self, lane: int, messages: MessageStream) -> None:
        hello = wire.LaneHello(self.to.migration, self.welcome.epoch, lane, self.welcome.token)
        with trio.move_on_after(self.settings.handshake_timeout):
            await messages.send(hello)
            answer = await messages.receive()
            if isinstance(answer, wire.Refused):
                # The session is over there; its control lane will tell.
                raise LinkError(f"{messages.address}: lane {lane} refused: {answer.why}")
            expect(answer, wire.LaneWelcome, Role.DESTINATION)
            return
        raise LinkError(f"{messages.address}: lane {lane}: no answer to our hello")

    async def _serve(self, messages: MessageStream) -> None:
        """Answers requests in a thread of its own, until the lane ends."""
        fd = messages.take_socket().fileno()
        server = Server(
            self.source,
            fd,
            checksum=self.welcome.checksum,
            poll_us=self.settings.poll_us,
            ahead=self.settings.ahead,
            tls=messages.tls,
        )
        self._server = server
        try:
            async with open_tasks() as tasks:
                tasks.start(_stop_when_cancelled, server)
                await self._in_a_thread(server.run)
                tasks.stop(LinkError("urgent lane: given up"))
        finally:
            self._server = None
            server.close()

    async def _push_on(self, lane: int, messages: MessageStream) -> None:
        """Sends this lane's part of every push, until the lane ends."""
        socket = messages.take_socket()
        push = Push(self.source, lane, socket.fileno(), checksum=self.welcome.checksum, tls=messages.tls)
        try:
            async with open_tasks() as tasks:
                tasks.start(self._hear, push, lane, socket)
                while True:
                    await self._send_part(push, lane, socket)
                    with trio.move_on_after(self.settings.heartbeat):
                        await self._next_push(lane)
                        continue
                    await self._in_a_thread(push.beat)
        finally:
            push.close()

    async def _send_part(self, push: Push, lane: int, socket: trio.socket.SocketType) -> None:
        turn = self._round
        if self._pushed[lane] == turn:
            return
        while (state := await self._in_a_thread(push.run, STEP_US)) is not PushState.DONE:
            if state is PushState.FULL:
                await trio.lowlevel.wait_writable(socket)
            elif state is PushState.EARLY:
                await self._hold(push)
        async with self._turn:
            self._pushed[lane] = turn
            self._turn.notify_all()

    async def _hold(self, push: Push) -> None:
        """Waits as the rate asks, and says meanwhile that we are alive."""
        pause = self.source.pause
        while pause > self.settings.heartbeat:
            await self._in_a_thread(push.beat)
            await trio.sleep(self.settings.heartbeat)
            pause = self.source.pause
        await trio.sleep(pause)

    async def _next_push(self, lane: int) -> None:
        async with self._turn:
            while self._pushed[lane] == self._round:
                await self._turn.wait()

    async def _hear(self, push: Push, lane: int, socket: trio.socket.SocketType) -> None:
        """The destination says nothing on a background lane but that it is alive."""
        while True:
            with trio.move_on_after(self.settings.dead_after) as scope:
                while not push.hear():
                    await trio.lowlevel.wait_readable(socket)
                await trio.lowlevel.checkpoint()
            if scope.cancelled_caught:
                raise LinkError(f"background lane {lane}: silent for {self.settings.dead_after:.1f} s")

    async def _in_a_thread(self, call: Callable[..., T], *args: int) -> T:
        """A native step, off the event loop. All lanes may be in one at the same time."""
        return await trio.to_thread.run_sync(call, *args, limiter=self._threads)


async def _stop_when_cancelled(server: Server) -> None:
    """A thread in native code is not cancelled; it is told."""
    try:
        await trio.sleep_forever()
    finally:
        server.stop()
