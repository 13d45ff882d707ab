"""One migration at its destination, from the hand-off until nothing is missing."""

import enum
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import trio

from gmemd.errors import AbandonedError, GmemdError, LinkError, RefusedError, UnavailableError
from gmemd.migrate import wire
from gmemd.migrate.link import ControlLane, LinkSettings, MessageStream
from gmemd.migrate.session import SPACE_SECONDS, Session
from gmemd.migrate.tasks import open_tasks
from gmemd.native.destination import Destination, Pager
from gmemd.native.memory import Memory, Note, Verdict
from gmemd.rates import Rates

log = logging.getLogger(__name__)

FIRST_PAUSE = 0.001  # before the ranges of a VMM are tried again; doubles up to SPACE_SECONDS
EVENT_SECONDS = 1.0  # in which a thread of the VMM comes back from its event, on a busy host, too


class Phase(enum.Enum):
    """What the guest has of this host."""

    WAITING = "waiting"  # for the source
    PREPARING = "preparing"  # the source is there, the guest still runs on it
    RUNNING = "running"  # the guest runs here, and pages are missing
    COMPLETE = "complete"
    ABANDONED = "abandoned"


@dataclass(slots=True)
class Report:
    """What an operator asks about. Times of CLOCK_MONOTONIC in seconds."""

    switched: float | None = None  # or since this daemon has it
    completed: float | None = None
    stuck: str | None = None  # why pages could not be put in place, while that lasts
    stuck_since: float | None = None
    link: str | None = None  # why there is no source, while there is none
    peer: str | None = None  # what the latest source has shown, with TLS
    ktls: list[str] | None = None  # what the kernel does of TLS, with TLS
    verdict: Verdict | None = None  # of the comparison after the end


class IncomingMigration:
    """Owns everything of one migration but the descriptors, which are its creator's."""

    def __init__(
        self,
        name: str,
        memory: Memory,
        pager: Pager,
        settings: LinkSettings,
        lane_threads: trio.CapacityLimiter,
        *,
        owner: int,
        state_limit: int,
        keep_state: Callable[[bytes], None],
        keep_digests: Callable[[int], None],
        trace: bool = False,
    ) -> None:
        self.name = name
        self.memory = memory
        self.pager = pager
        self.settings = settings
        self.lane_threads = lane_threads
        self.owner = owner  # the VMM's user
        self.state_limit = state_limit
        self.keep_state = keep_state  # for a successor, in case the VMM does not get it from us
        self._keep_digests = keep_digests  # for a successor, too
        self.destination = Destination(memory, trace=trace)
        self.phase = Phase.WAITING
        self.report = Report()
        self.rates = Rates()
        self.state: bytes | None = None  # the VMM's own, until the VMM has it
        self.session: Session | None = None
        self.token = b""  # of the latest session
        self.token_before = b""  # of the one that its source had heard of before
        self.ready = trio.Event()  # the guest may run here, or never will
        self.ended = trio.Event()
        self._full = trio.Event()  # nothing is missing
        self._stuck_again = False  # since the last attempt
        self._lasting = False  # what it is stuck for now is not over when pages meet no trouble

    def start(self) -> None:
        """Registers the memory. From here on, a fault waits until its page has come."""
        self.memory.register()
        self.pager.add(self.destination)

    def resume(self, state: bytes | None) -> None:
        """Goes on where another daemon ended; `state` is the VMM's own, if the VMM has not had it."""
        self.pager.add(self.destination)
        try:
            self.memory.wake()
        except GmemdError as error:  # the VMM has died, or is about to
            self._stuck(error)
        self.destination.ask_vcpus()
        if self.memory.note(Note.SWITCHED):
            self.state = state
            self._run_guest()
        if self.memory.received == self.memory.pages:
            self._full.set()

    @property
    def epoch(self) -> int:
        """The latest session's."""
        return self.memory.note(Note.EPOCH)

    @property
    def switched(self) -> bool:
        """Whether the guest has left its source."""
        return self.memory.note(Note.SWITCHED) != 0

    @property
    def recoveries(self) -> int:
        """Sessions after the first, under this daemon and those before it."""
        return self.memory.note(Note.RECOVERIES)

    @property
    def why_abandoned(self) -> str:
        return self.report.stuck or self.report.link or "given up"

    async def run(self) -> None:
        """Watches over the migration until it has ended, either way."""
        async with open_tasks() as tasks:
            for task in (self._watch_events, self._complete, self._retry_what_is_stuck):
                tasks.start(task)
            await self.ended.wait()
            tasks.stop()

    async def close(self) -> bool:
        """Frees what is left, after the session has ended. Returns whether the source knows that all is complete."""
        self.ended.set()  # whoever waits for a place comes too late
        heard = False
        if session := self.session:
            if self.phase is Phase.COMPLETE:
                heard = await session.finish()
            gone = AbandonedError(self.why_abandoned) if self.phase is Phase.ABANDONED else None
            await session.stop(gone)
        if self.phase is Phase.COMPLETE and self.memory.digests_fd >= 0 and not self.report.verdict:
            log.warning("complete, and not compared: the source has gone", extra={"migration": self.name})
        self.pager.remove(self.destination)
        self.destination.close()
        self.memory.close()
        return heard

    async def serve_source(self, control: ControlLane, hello: wire.Hello) -> None:
        """Talks with a source until it goes, or until the migration ends. Raises what the connection ended with."""
        await self._admit(hello)
        if self.epoch:
            self.memory.set_note(Note.RECOVERIES, self.recoveries + 1)
        self.memory.set_note(Note.EPOCH, self.epoch + 1)
        if self.phase is Phase.WAITING:
            self.phase = Phase.PREPARING
        self.report.link = None
        if tls := control.messages.tls:
            self.report.peer, self.report.ktls = tls.peer, tls.ktls
        else:
            self.report.peer = self.report.ktls = None
        session = self.session = Session(self, control, hello, self.epoch)
        self.token, self.token_before = session.token, hello.token
        log.info("source %s, epoch %d", control.messages.address, self.epoch, extra={"migration": self.name})
        try:
            await session.run()
        except GmemdError as error:
            self.report.link = str(error)
            raise
        finally:
            if self.session is session:
                self.session = None
                if self.phase is Phase.PREPARING:
                    self.phase = Phase.WAITING

    async def attach(self, hello: wire.LaneHello, messages: MessageStream) -> None:
        """Gives a page lane to the session that it belongs to."""
        session = self.session
        if session is None or hello.epoch != session.epoch:
            raise RefusedError(f"lane {hello.lane}: epoch {hello.epoch} is over: sent by the source")
        await session.attach(hello, messages)

    def switch(self, state: bytes) -> None:
        """The guest has stopped at the source."""
        self.state = state
        self.keep_state(state)
        self.memory.set_note(Note.SWITCHED, 1)
        self._run_guest()
        self.pager.ask(self.destination)  # what the VMM itself has touched: the source passed over requests until now

    async def keep_digests(self) -> bool:
        """Keeps in mind from now on what pages have when they are put in place; returns whether that can be done."""
        if self.memory.digests_fd < 0:
            try:
                await trio.to_thread.run_sync(self.memory.keep_digests)
            except GmemdError as error:
                log.warning("nothing will be compared: %s", error, extra={"migration": self.name})
                return False
            self._keep_digests(self.memory.digests_fd)
        return True

    def compared(self, verdict: Verdict) -> None:
        """The source has what came, or not."""
        self.report.verdict = verdict
        log.log(logging.ERROR if verdict.mismatches else logging.INFO, "%s", verdict, extra={"migration": self.name})

    def _run_guest(self) -> None:
        self.phase = Phase.RUNNING
        self.report.switched = time.monotonic()
        self.ready.set()
        log.info(
            "the guest runs here from now on, %d of %d pages are missing",
            self.memory.pages - self.memory.received,
            self.memory.pages,
            extra={"migration": self.name},
        )

    def end(self, phase: Phase) -> None:
        """The migration is over."""
        if not self.ended.is_set():
            self.phase = phase
            if phase is Phase.ABANDONED:
                missing = self.memory.pages - self.memory.received
                log.info("abandoned: %s; %d pages missing", self.why_abandoned, missing, extra={"migration": self.name})
            self.report.completed = time.monotonic()
            self.ready.set()
            self.ended.set()

    async def _admit(self, hello: wire.Hello) -> None:
        """Refuses a source that is not ours, one too many, or one that was replaced; ends the session that it has."""
        regions = [[r.gpa, r.pages, r.page_shift] for r in self.memory.regions]
        if hello.regions != regions:
            raise RefusedError(_difference(hello.regions, regions))
        self._check_epoch(hello)
        while session := self.session:
            if session.is_with(hello):
                await session.stop()
            else:
                await self._wait_for_place(session, hello)
            self._check_epoch(hello)

    def _check_epoch(self, hello: wire.Hello) -> None:
        if self.ended.is_set():  # and its memory may be gone already
            raise LinkError(f"migration {self.name} has just ended: {self.phase.value}")
        if hello.epoch > self.epoch:
            raise RefusedError(f"epoch {hello.epoch} is in the future (now is {self.epoch}): sent by the source")

    async def _wait_for_place(self, session: Session, hello: wire.Hello) -> None:
        """A source that died without a word is found out by its silence; only then may another take its place, or one
        that has missed a welcome."""
        with trio.move_on_after(self.settings.dead_after + self.settings.heartbeat):
            await session.over.wait()
            return
        if hello.epoch:
            raise RefusedError(f"epoch {hello.epoch} is over (now is {self.epoch}): another source took its place")
        raise RefusedError(f"migration {self.name} has a source already: {session.control.messages.address}")

    async def _watch_events(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self.destination.event_fd)
            events = self.destination.events()
            if events.complete:
                self._full.set()
            elif events.vmm_gone:
                log.warning("the VMM has died", extra={"migration": self.name})
                self.report.link = "the VMM has died"
                self.end(Phase.ABANDONED)
            if events.vmm_broken:
                self._lasting = True
            if events.stuck or events.vmm_broken:
                self._stuck(events.problem)
            if events.urgent_down and self.session:
                self.session.urgent_ended(events.problem)

    async def _complete(self) -> None:
        """When nothing is missing, and the guest has come: memory without the VMM's own state is not a guest."""
        await self._full.wait()
        await self.ready.wait()
        self._lasting = True
        begun, pause = time.monotonic(), FIRST_PAUSE
        while not self._let_go(begun):
            await trio.sleep(pause)
            pause = min(2 * pause, SPACE_SECONDS)
        self.report.stuck = self.report.stuck_since = None
        log.info("complete, %d pages", self.memory.pages, extra={"migration": self.name})
        self.end(Phase.COMPLETE)

    def _let_go(self, begun: float) -> bool:
        """Whether no thread of the VMM waits for us any more, or can."""
        try:
            if self.memory.unregister():
                return True
            waited = time.monotonic() - begun
            log.debug("a thread of the VMM is in its event still", extra={"migration": self.name})
            if waited > EVENT_SECONDS:
                self._stuck(UnavailableError(f"a thread of the VMM does not come back from its event ({waited:.1f} s)"))
        except GmemdError as error:  # the VMM is on its way out, or has unmapped what it handed over
            self._stuck(error)
        return False

    def _stuck(self, problem: GmemdError) -> None:
        """Said once, however many pages it meets and however often they are tried."""
        self._stuck_again = True
        if self.report.stuck is None:
            self.report.stuck_since = time.monotonic()
            log.error("%s", problem, extra={"migration": self.name})
        self.report.stuck = str(problem)

    async def _retry_what_is_stuck(self) -> None:
        """Until an attempt has met no trouble."""
        while True:
            await trio.sleep(SPACE_SECONDS)
            if self.report.stuck is None:
                continue
            if self._stuck_again:
                self._stuck_again = False
                self.pager.ask(self.destination)
            elif not self._lasting:
                self.report.stuck = self.report.stuck_since = None
                log.info("goes on", extra={"migration": self.name})


def _difference(theirs: list[list[int]], ours: list[list[int]]) -> str:
    """The first thing in which the source's guest memory differs from the VMM's."""
    for index, (their, our) in enumerate(zip(theirs, ours, strict=False)):
        for name, a, b in zip(("gpa", "pages", "page shift"), their, our, strict=True):
            if a != b:
                return f"region {index}: {name} {a} at the source, {b} at the VMM here"
    return f"{len(theirs)} regions at the source, {len(ours)} at the VMM here"
