"""One migration at its source: connects, sends, and connects again until the destination has everything."""

import logging
import random
import time
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Protocol

import trio

from gmemd.errors import AbandonedError, GmemdError, LinkError, ProtocolError, RefusedError, UntrustedError
from gmemd.migrate import runs, wire
from gmemd.migrate.link import ControlLane, LinkSettings, connect, expect
from gmemd.migrate.pagelanes import PageLanes
from gmemd.migrate.state import Phase, Role
from gmemd.migrate.tasks import Tasks, open_tasks
from gmemd.migrate.tls import Secured
from gmemd.migrate.verify import steps
from gmemd.native.memory import Memory, Verdict
from gmemd.native.source import Source

log = logging.getLogger(__name__)

# Between two attempts to connect: at once, then longer, up to this, and not all sources of a host at the same moment.
FIRST_PAUSE = 0.05
LONGEST_PAUSE = 2.0
# A daemon that restarts is back within this; so long, the guest should not wait for us to notice.
RESTART_SECONDS = 10.0
RESTART_PAUSE = 0.03
JITTER = 0.5
WAITING = "waiting for the VMM there"


class Guest(Protocol):
    """The VMM that the memory is from."""

    async def pause(self) -> bytes:
        """Stops the guest, if it still runs, and returns the VMM's own state (possibly b"")."""


@dataclass(frozen=True, slots=True)
class Destination:
    """Where to send: an address, the migration's name there, over how many background lanes, and whether to send more
    than is asked for: without, the migration ends only when the guest has touched everything. `secured`: as whom and
    to whom, with TLS. `verify`: have it compare what it got."""

    host: str
    port: int
    migration: str
    lanes: int = 1
    background: bool = True
    secured: Secured | None = None
    verify: bool = False


@dataclass(slots=True)
class Progress:
    """What there is to tell while it goes on. Times of CLOCK_MONOTONIC in seconds."""

    phase: str = "connecting"
    started: float = field(default_factory=time.monotonic)
    switched: float | None = None
    completed: float | None = None
    recoveries: int = 0
    ktls: list[str] | None = None  # what the kernel does of TLS, with TLS
    trouble: str | None = None
    verdict: Verdict | None = None


class OutgoingMigration:
    """Sends the memory of one guest. The descriptors stay the caller's."""

    def __init__(self, to: Destination, memory: Memory, guest: Guest, settings: LinkSettings, seed: int = 0) -> None:
        self.to = to
        self.memory = memory
        self.guest = guest
        self.settings = settings
        self.source = Source(memory)
        self.progress = Progress()
        self.epoch = 0
        self.token = b""
        self._random = random.Random(seed)
        self._state: bytes | None = None
        self._welcomed = False  # on the connection there is, or was last

    @property
    def switched(self) -> bool:
        """Whether the guest has left, so that it must not run here any more."""
        return self.progress.switched is not None

    @property
    def may_resume(self) -> bool:
        """Whether the guest may run here again: the destination has said that it had not left, and we have not let it
        go since. Before the first welcome we cannot know: another gmemd-source may have been here before us."""
        return self.epoch != 0 and not self.switched

    async def run(self, patience: float | None = None) -> None:
        """Sends until the destination has everything. `patience`: seconds to go on trying without a connection before
        the guest has left, None for ever; after it has left, we try for ever."""
        pause = 0.0
        lost = time.monotonic()
        while True:
            try:
                await self._session()
                return
            except (LinkError, UntrustedError) as error:
                # Once the guest has left, somebody has to mend the certificates, and we have to be here then.
                if isinstance(error, UntrustedError) and not self.switched:
                    raise
                if self.progress.phase not in ("connecting", "reconnecting"):
                    lost, pause = time.monotonic(), 0.0
                if self._welcomed:  # a connection that only waited for the VMM there is no loss
                    self._welcomed = False
                    self.progress.recoveries += 1
                self._note(error)
                if patience is not None and not self.switched and time.monotonic() - lost > patience:
                    raise
            self.progress.phase = "reconnecting" if self.epoch else "connecting"
            await trio.sleep(pause * (1 + JITTER * self._random.random()))
            longest = RESTART_PAUSE if self.epoch and time.monotonic() - lost < RESTART_SECONDS else LONGEST_PAUSE
            pause = min(longest, max(FIRST_PAUSE, 2 * pause))

    def close(self) -> None:
        """Frees what is native."""
        self.source.close()
        self.memory.close()

    def _note(self, error: GmemdError) -> None:
        if self.progress.trouble != str(error):
            log.log(logging.WARNING if isinstance(error, UntrustedError) else logging.INFO, "%s", error)
        self.progress.trouble = str(error)

    async def _session(self) -> None:
        """One session, until the destination has everything; LinkError when it is worth another."""
        messages = await connect(self.to.host, self.to.port, self.settings.handshake_timeout, self.to.secured)
        async with messages.stream:
            control = ControlLane(messages, Role.SOURCE)
            self.progress.ktls = messages.tls.ktls if messages.tls else None
            welcome = await self._greet(control)
            if welcome:
                self.epoch, self.token = welcome.epoch, welcome.token
                self._welcomed = True
                if welcome.switched:
                    self.source.open()
                    self.progress.switched = self.progress.switched or time.monotonic()
                self.progress.phase = "joining"
                self.progress.trouble = None
                await self._converse(control, welcome)
            self.progress.phase = "complete"
            self.progress.completed = self.progress.completed or time.monotonic()

    async def _converse(self, control: ControlLane, welcome: wire.Welcome) -> None:
        try:
            await _Session(self, control, welcome).run()
        except GmemdError as error:
            if self.progress.completed:  # and only the comparison is lost
                self.progress.trouble = str(error)
                return
            if isinstance(error, LinkError):
                raise
            if control.conversation.phase is not Phase.ENDED:
                with trio.move_on_after(self.settings.dead_after), suppress(LinkError):
                    await control.messages.send_last(wire.Failed(str(error)[: wire.MAX_TEXT]))
            raise

    async def _greet(self, control: ControlLane) -> wire.Welcome | None:
        """The destination's welcome; None if it has everything already."""
        address = control.messages.address
        regions = [[r.gpa, r.pages, r.page_shift] for r in self.memory.regions]
        checksum = self.settings.checksum and control.messages.tls is None  # TLS tells of every wrong bit, too
        hello = wire.Hello(self.to.migration, self.epoch, self.token, self.to.lanes, checksum, regions, self.to.verify)
        await control.send(hello)
        while True:
            with trio.move_on_after(self.settings.handshake_timeout):
                message = await control.receive()
                if isinstance(message, wire.Waiting):
                    if self.progress.phase != WAITING:
                        log.info("%s: waits for the VMM of migration %s there", address, self.to.migration)
                    self.progress.phase = WAITING
                    continue
                if isinstance(message, wire.Complete) and self.switched:
                    return None
                _take_no(message, address)
                return expect(message, wire.Welcome, Role.DESTINATION)
            raise LinkError(f"{address}: no answer to our hello")

    async def state(self) -> bytes:
        """Stops the guest, once."""
        if self._state is None:
            self._state = await self.guest.pause()
        return self._state


class _Session:
    """The source's end of one session."""

    def __init__(self, migration: OutgoingMigration, control: ControlLane, welcome: wire.Welcome) -> None:
        self.migration = migration
        self.control = control
        self.lanes = PageLanes(migration.source, migration.to, welcome, migration.settings)
        self.verify = migration.to.verify and welcome.verify
        self._restarted = False  # what is to be sent has been set for the next Go

    async def run(self) -> None:
        """Returns when the destination has everything."""
        async with open_tasks() as tasks:
            tasks.start(self._beat)
            tasks.start(self.lanes.run)
            await self._listen(tasks)
            tasks.stop()

    async def _listen(self, tasks: Tasks) -> None:
        while True:
            message = await self.control.receive()
            if isinstance(message, wire.Received):
                self._take_received(message)
            elif isinstance(message, wire.Go):
                tasks.start(self._send_all)
            elif isinstance(message, wire.Complete):
                if not self.verify:
                    return
                if self.migration.progress.completed is None:
                    self.migration.progress.completed = time.monotonic()
                    self.migration.progress.phase = "comparing"
                    tasks.start(self._send_digests)
            elif isinstance(message, wire.Verified):
                self.migration.progress.verdict = Verdict(**{f.name: getattr(message, f.name) for f in fields(Verdict)})
                return
            else:
                _take_no(message, self.control.messages.address)

    def _take_received(self, message: wire.Received) -> None:
        regions = self.migration.memory.regions
        if message.region >= len(regions):
            raise ProtocolError(
                f"control lane: received pages in region {message.region} of {len(regions)}: sent by the destination"
            )
        some = runs.decode_untrusted(message.start, message.runs, regions[message.region].pages)
        self._restart()
        for first, pages in some:
            self.migration.source.skip(message.region, first, pages)

    def _restart(self) -> None:
        """Nothing is being pushed when the destination says what it has."""
        if not self._restarted:
            self.migration.source.restart()
            self._restarted = True

    async def _send_all(self) -> None:
        """From a Go on: the guest if it has not left, then what is zero, then the rest."""
        migration = self.migration
        source = migration.source
        self._restart()
        self._restarted = False
        if self.control.conversation.phase is Phase.SWITCHING:
            await self._switch()
        migration.progress.phase = "sending"
        for region in range(len(migration.memory.regions)):
            for some in source.holes(region):
                for start, code in runs.encode(some):
                    await self.control.send(wire.Zero(region, start, code))
        if not migration.to.background:
            return
        await self.lanes.push()
        migration.progress.phase = "sent"
        await self.control.send(wire.Pushed())

    async def _send_digests(self) -> None:
        memory = self.migration.memory
        for region, first, pages in steps(memory):
            digests = await trio.to_thread.run_sync(memory.digests, region, first, pages)
            await self.control.send(wire.Digests(region, first, digests))
        await trio.sleep(self.migration.settings.handshake_timeout)
        raise LinkError(f"{self.control.messages.address}: no answer to our digests")

    async def _switch(self) -> None:
        state = await self.migration.state()
        self.migration.source.open()
        for at in range(0, len(state), wire.STATE_PIECE):
            await self.control.send(wire.State(state[at : at + wire.STATE_PIECE]))
        # From the moment the destination may have this, the guest may run there, and must not here.
        self.migration.progress.switched = time.monotonic()
        await self.control.send(wire.Switch(len(state)))

    async def _beat(self) -> None:
        settings = self.migration.settings
        while True:
            await trio.sleep(settings.heartbeat)
            with trio.move_on_after(settings.dead_after) as scope:
                await self.control.send(wire.Beat())
            if scope.cancelled_caught or self.control.silent_for > settings.dead_after:
                raise LinkError(f"{self.control.messages.address}: silent for {self.control.silent_for:.1f} s")
            await self.lanes.beat()


def _take_no(message: wire.Message, address: str) -> None:
    """Raises what the destination means, if it is a no."""
    if isinstance(message, wire.Refused):
        raise RefusedError(f"{address}: refused: {message.why}")
    if isinstance(message, wire.Failed):
        raise AbandonedError(f"{address}: given up: {message.why}")
