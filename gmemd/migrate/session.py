"""The destination's end of one source's connections: a control lane, an urgent lane, background lanes.

A session lives as long as its control lane. A page lane may end and be replaced meanwhile; what it lost is found
missing at the end, and sent again. Another session takes over from the received bitmap.
"""

import logging
import secrets
import time
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

import trio

from gmemd.errors import GmemdError, LinkError, ProtocolError, RefusedError
from gmemd.migrate import runs, wire
from gmemd.migrate.link import ControlLane, MessageStream
from gmemd.migrate.state import Phase
from gmemd.migrate.tasks import Tasks, open_tasks
from gmemd.migrate.verify import Comparison
from gmemd.native.destination import Lane

if TYPE_CHECKING:
    from gmemd.migrate.destination import IncomingMigration

log = logging.getLogger(__name__)

URGENT = 0
# A lane thread gives its place to another migration's lane after this long.
STEP_US = 20_000
# After the source has sent all, this long without a page means that what is missing was lost on the way.
QUIET_SECONDS = 0.25
MAX_QUIET_SECONDS = 5.0
# How soon a page for which there was no space is tried again.
SPACE_SECONDS = 0.5


class PageLane:
    """One page lane that is attached."""

    def __init__(self, lane: Lane, messages: MessageStream) -> None:
        self.lane = lane
        self.messages = messages
        self.scope = trio.CancelScope()
        self.over = trio.Event()
        self.welcome = False  # we may send beats
        self.empty = True  # nothing waits to be read

    @property
    def silent_for(self) -> float:
        """Seconds since something came, as far as we have looked."""
        return (time.monotonic_ns() - self.lane.heard_ns) / 1e9 if self.empty else 0.0


class Session:
    """One source, from its welcome until it goes."""

    def __init__(self, migration: "IncomingMigration", control: ControlLane, hello: wire.Hello, epoch: int) -> None:
        self.migration = migration
        self.control = control
        self.epoch = epoch
        self.token = secrets.token_bytes(wire.TOKEN_BYTES)
        self.checksum = hello.checksum and migration.settings.checksum
        self.comparison: Comparison | None = None  # where it was asked for
        self.over = trio.Event()
        self.lanes: dict[int, PageLane] = {}
        self._verify = hello.verify
        self._heard = hello.epoch, hello.token  # of what went before, by its source
        self._expected = set(range(hello.lanes + 1))
        self._all_there = trio.Event()
        self._tasks: Tasks | None = None
        self._state = bytearray()

    def is_with(self, hello: wire.Hello) -> bool:
        """Whether this hello is from the same source, which may not have heard our welcome."""
        return hello.epoch == self.epoch or (hello.epoch > 0 and (hello.epoch, hello.token) == self._heard)

    async def run(self) -> None:
        """Serves the source; returns when we end the session, and raises what else it ends with."""
        self.control.expect_signs_of_life()
        try:
            async with open_tasks() as self._tasks:
                for task in (self._open, self._listen, self._beat):
                    self._tasks.start(task)
        finally:
            self._tasks = None
            self.over.set()

    async def stop(self, error: GmemdError | None = None) -> None:
        """Ends the session, and waits until it is over."""
        if self._tasks:
            self._tasks.stop(error)
        await self.over.wait()

    async def finish(self) -> bool:
        """Tells the source that nothing is missing. Returns whether it has heard: then it hangs up, or has pages
        compared, for as long as that takes."""
        with trio.move_on_after(self.migration.settings.dead_after), suppress(GmemdError):
            await self.control.send(wire.Complete(self.migration.memory.pages))
            if not self.comparison:
                await self.over.wait()
        if self.comparison:
            await self._wait_for(self.comparison)
        heard = self.comparison.taken > 0 if self.comparison else self.over.is_set()
        if self._tasks:
            self._tasks.stop()
        return heard

    async def _wait_for(self, comparison: Comparison) -> None:
        """Until the source has hung up, or is alive and sends nothing to compare."""
        seen = -1
        while not self.over.is_set() and comparison.taken != seen:
            seen = comparison.taken
            with trio.move_on_after(self.migration.settings.handshake_timeout):
                await self.over.wait()

    async def attach(self, hello: wire.LaneHello, messages: MessageStream) -> None:
        """Takes a page lane in, in place of one with the same number."""
        if not secrets.compare_digest(hello.token, self.token) or hello.lane not in self._expected:
            raise RefusedError(f"lane {hello.lane} is none of this session's: sent by the source")
        while old := self.lanes.get(hello.lane):
            old.scope.cancel()
            await old.over.wait()
        if self._tasks is None or self._tasks.stopped:
            raise RefusedError(f"lane {hello.lane}: epoch {hello.epoch} is over: sent by the source")
        # Nobody waits between the look at `lanes` and this: two lanes of one number would share a slot.
        fd = messages.take_socket().fileno()
        native = Lane(self.migration.destination, hello.lane, fd, checksum=self.checksum, tls=messages.tls)
        lane = PageLane(native, messages)
        self.lanes[hello.lane] = lane
        self._tasks.start(self._run_lane, hello.lane, lane)

    def urgent_ended(self, problem: GmemdError) -> None:
        """The pager has dropped the urgent lane."""
        if lane := self.lanes.get(URGENT):
            self._lane_failed(URGENT, problem)
            lane.scope.cancel()

    async def _open(self) -> None:
        """Lets the source in: page lanes first, then what is here already."""
        migration = self.migration
        if self._verify and await migration.keep_digests():
            self.comparison = Comparison(migration.memory, migration.lane_threads)
        verify = self.comparison is not None
        await self.control.send(wire.Welcome(self.epoch, self.token, self.checksum, migration.switched, verify))
        with trio.move_on_after(migration.settings.handshake_timeout):
            await self._all_there.wait()
        if not self._all_there.is_set():
            missing = sorted(self._expected - self.lanes.keys())
            raise LinkError(f"{self.control.messages.address}: lanes {missing} did not come")
        if migration.switched and migration.memory.received == migration.memory.pages:
            await self.finish()
        else:
            await self._ask_for_the_rest()

    async def _ask_for_the_rest(self) -> None:
        memory = self.migration.memory
        for region in range(len(memory.regions)):
            for some in memory.received_runs(region):
                for start, code in runs.encode(some):
                    await self.control.send(wire.Received(region, start, code))
        await self.control.send(wire.Go())

    async def _listen(self) -> None:
        while True:
            message = await self.control.receive()
            if isinstance(message, wire.Zero):
                await self._take_zero(message)
            elif isinstance(message, wire.State):
                self._take_state(message)
            elif isinstance(message, wire.Switch):
                self._take_switch(message)
            elif isinstance(message, wire.Pushed):
                assert self._tasks is not None
                self._tasks.start(self._look_for_lost)
            elif isinstance(message, wire.Digests):
                await self._compare(message)
            elif isinstance(message, wire.Failed):
                raise LinkError(f"the source gave up: {message.why}")

    def _take_state(self, message: wire.State) -> None:
        if len(self._state) + len(message.piece) > self.migration.state_limit:
            raise ProtocolError(
                f"control lane: state of more than {self.migration.state_limit} bytes: sent by the source"
            )
        self._state += message.piece

    def _take_switch(self, message: wire.Switch) -> None:
        if message.size != len(self._state):
            raise ProtocolError(
                f"control lane: state of {len(self._state)} bytes, {message.size} announced: sent by the source"
            )
        self.migration.switch(bytes(self._state))
        self._state.clear()

    async def _take_zero(self, message: wire.Zero) -> None:
        regions = self.migration.memory.regions
        if message.region >= len(regions):
            raise ProtocolError(
                f"control lane: zero pages in region {message.region} of {len(regions)}: sent by the source"
            )
        zeros = runs.decode_untrusted(message.start, message.runs, regions[message.region].pages)

        def take() -> None:
            for first, pages in zeros:
                self.migration.destination.told_zero(message.region, first, pages)

        await trio.to_thread.run_sync(take, limiter=self.migration.lane_threads)

    async def _compare(self, message: wire.Digests) -> None:
        if self.comparison is None:
            raise ProtocolError("control lane: digests, and nothing is to be compared: sent by the source")
        if verdict := await self.comparison.take(message):
            self.migration.compared(verdict)
            await self.control.send(wire.Verified(**asdict(verdict)))

    async def _look_for_lost(self) -> None:
        """The source has sent all. What is not here when the lanes have fallen quiet was lost, and is asked for
        again."""
        memory = self.migration.memory
        quiet = QUIET_SECONDS
        received = -1
        while received != memory.received or not all(lane.empty for lane in self.lanes.values()):
            received = memory.received
            await trio.sleep(quiet)
            quiet = min(2 * quiet, MAX_QUIET_SECONDS)
        if received < memory.pages:
            log.info("%d pages were lost on the way", memory.pages - received, extra={"migration": self.migration.name})
            await self._ask_for_the_rest()

    async def _beat(self) -> None:
        """Says that we are alive, on every lane, and finds out who is not."""
        settings = self.migration.settings
        while True:
            await trio.sleep(settings.heartbeat)
            if self.control.conversation.phase is Phase.ENDED and not self.comparison:
                return
            with trio.move_on_after(settings.dead_after) as sending:
                await self.control.send(wire.Beat())
            if sending.cancelled_caught or self.control.silent_for > settings.dead_after:
                raise LinkError(f"{self.control.messages.address}: silent for {self.control.silent_for:.1f} s")
            self.migration.pager.beat(self.migration.destination)
            for number, lane in list(self.lanes.items()):
                if number != URGENT and lane.welcome:
                    lane.lane.beat()
                if lane.silent_for > settings.dead_after and not lane.scope.cancel_called:
                    self._lane_failed(number, LinkError(f"silent for {lane.silent_for:.1f} s"))
                    lane.scope.cancel()

    async def _run_lane(self, number: int, lane: PageLane) -> None:
        try:
            with lane.scope:
                await lane.messages.send(wire.LaneWelcome())
                lane.welcome = True
                if self.lanes.keys() == self._expected:
                    self._all_there.set()
                if number == URGENT:
                    self.migration.pager.set_urgent(self.migration.destination, lane.lane)
                    await trio.sleep_forever()
                else:
                    await self._receive(lane)
        except GmemdError as error:
            self._lane_failed(number, error)
        finally:
            if number == URGENT:
                self.migration.pager.set_urgent(self.migration.destination, None)
            lane.lane.close()
            if self.lanes.get(number) is lane:
                del self.lanes[number]
            lane.over.set()
            await trio.aclose_forcefully(lane.messages.stream)

    async def _receive(self, lane: PageLane) -> None:
        fd = lane.messages.take_socket().fileno()
        while True:
            lane.empty = False
            while await trio.to_thread.run_sync(lane.lane.receive, STEP_US, limiter=self.migration.lane_threads):
                if lane.lane.held:
                    await trio.sleep(SPACE_SECONDS)
            lane.empty = True
            await trio.lowlevel.wait_readable(fd)

    def _lane_failed(self, number: int, error: GmemdError) -> None:
        """A lane's end is the link's business; wrong bytes are worse, and end the session."""
        log.info("%s", error, extra={"migration": self.migration.name, "lane": number})
        if isinstance(error, ProtocolError) and self._tasks:
            self._tasks.stop(error)
