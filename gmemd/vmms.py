"""The daemon's side of a VMM that receives: from its hand-off until it needs us no more."""

import errno
import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import trio

from gmemd import guestmemory, handoff
from gmemd.callers import Caller, VmmRules
from gmemd.config import Config
from gmemd.errors import GmemdError, HandoffError, KernelError, PermissionRefusedError, UnavailableError
from gmemd.handoff import Descriptors, Handoff
from gmemd.keeping import BLOB, DIGESTS, ENDED, VMM, Keeper, Kept, Stranded
from gmemd.migrate.destination import IncomingMigration, Phase
from gmemd.migrate.link import LinkSettings
from gmemd.migrate.session import SPACE_SECONDS
from gmemd.migrate.tasks import open_tasks
from gmemd.native import lib
from gmemd.native.destination import Pager
from gmemd.native.memory import Memory, Note
from gmemd.notify import Notifier
from gmemd.places import Places
from gmemd.populate import Chooser
from gmemd.registry import Finished, Registry
from gmemd.status import comparison, snapshot
from gmemd.stranded import hold
from gmemd.tracing import record, record_stages

log = logging.getLogger(__name__)

VMM_KNOWS = 2  # of Note.SWITCHED
SO_PEERPIDFD = 77  # since Linux 6.5; the socket module does not name it yet
# VMMs in the middle of a hand-off, each with up to 64 descriptors: in all, and of one user.
HANDING_OFF, OF_ONE_USER = 64, 48


@dataclass(frozen=True, slots=True)
class Shared:
    """What all migrations of a daemon share."""

    config: Config
    settings: LinkSettings
    registry: Registry
    pager: Pager
    chooser: Chooser
    store: Notifier
    lane_threads: trio.CapacityLimiter
    rules: VmmRules
    places: Places


class VmmConnection:
    """One VMM that has connected."""

    def __init__(self, shared: Shared, sock: trio.socket.SocketType) -> None:
        self.shared = shared
        self.sock = sock
        self.caller = Caller.of(sock)

    async def serve(self) -> None:
        """Takes the hand-off and stays until the migration is over. Whatever is wrong, the VMM is told."""
        descriptors = Descriptors()
        try:
            with self.shared.places.taken(self.caller.uid) as place:
                if not place:
                    raise UnavailableError(f"{self.caller}: too many VMMs in the middle of a hand-off")
                with trio.fail_after(self.shared.config.network.handshake_timeout):
                    data, descriptors = await handoff.receive(self.sock)
            if data:
                asked = handoff.receive_untrusted(handoff.parse_untrusted(data), len(descriptors.fds))
                self._may_receive(asked.migration)
                with self.shared.registry.reserved(asked.migration, self.caller.uid):
                    stranded = await self._receive(asked, descriptors.fds)
                if stranded:
                    await hold(stranded, self.shared.registry, self.shared.store)
        except GmemdError as error:
            log.warning("VMM refused: %s", error)
            await self._tell({"error": str(error)})
        except trio.TooSlowError:
            await self._tell({"error": "no hand-off came in time"})
        except OSError as error:
            log.info("VMM: %s", error)
        except Exception as bug:
            with suppress(OSError):  # what is left unread by who closes has the peer hear of that before our last word
                os.read(self.sock.fileno(), 1)
            await self._tell({"error": f"a bug of gmemd: {bug!r}"})
            raise
        finally:
            descriptors.close()

    def _may_receive(self, migration: str) -> None:
        if not self.shared.rules.allow(self.caller, migration):
            raise PermissionRefusedError(f"migration {migration}: no rule in [vmms] lets {self.caller} receive it")

    async def resume(self, kept: Kept, resumed: Callable[[], None]) -> None:
        """Goes on with a migration of a daemon that has ended; calls `resumed` when it does."""
        keeper = Keeper(self.shared.store, kept.migration)
        keeper.adopt(kept.parts)
        with self.shared.registry.reserved(kept.migration, self.caller.uid, kept=True):
            memory = Memory.adopt(kept.state, kept.fds)
            if memory.migration != kept.migration:
                name = memory.migration
                memory.close()
                raise HandoffError(f"the state is of another migration: {handoff.shown(name)}")
            if kept.digests is not None:
                _take_digests(memory, kept.digests)
            migration = self._migration(memory, keeper, kept.fds)
            blob = None if kept.blob is None else handoff.content(kept.blob)

            def start() -> None:
                migration.resume(blob)
                resumed()

            await self._attend(migration, keeper, start)

    async def _receive(self, asked: Handoff, fds: list[int]) -> Stranded | None:
        """Until the migration is over. One that fails when its guest has left the source is left to a successor."""
        memory = await trio.to_thread.run_sync(self._take_memory, asked, fds)
        keeper = Keeper(self.shared.store, asked.migration)
        memory.set_note(Note.VCPUS, asked.vcpus)
        memory.set_note(Note.FAULTS, asked.faults or 0)
        migration = self._migration(memory, keeper, fds)
        kinds = [guestmemory.kind_of(fds[region.file])[0] for region in asked.regions]

        def start() -> None:
            _start(migration, kinds)
            keeper.keep_all(memory.state_fd, self.sock.fileno(), fds)

        try:
            await self._attend(migration, keeper, start)
        except Exception as error:
            if migration.phase is not Phase.RUNNING:
                keeper.forget_guest()
                raise
            log.error("a migration has failed", exc_info=error, extra={"migration": migration.name})
            why = str(error) if isinstance(error, GmemdError) else f"a bug of gmemd: {error!r}"
            parts: dict[str, tuple[int, ...]] = dict.fromkeys(keeper.kept, ()) | {VMM: (self.sock.fileno(),)}
            return Stranded(migration.name, f"{why}; the next start of the daemon tries again", parts)
        return None

    async def _attend(self, migration: IncomingMigration, keeper: Keeper, start: Callable[[], None]) -> None:
        """From its start until it is over, or until we are: then it is left to a successor."""
        trace = self.shared.config.trace
        try:
            start()
            await self.shared.registry.add(migration)
            log.info(
                "%s: %d bytes in %d regions",
                migration.phase.value,
                migration.memory.size,
                len(migration.memory.regions),
                extra={"migration": migration.name},
            )
            async with open_tasks() as tasks:
                tasks.start(migration.run)
                tasks.start(self._watch_process, migration)
                tasks.start(self._listen, migration)
                if trace.directory:
                    tasks.start(record, migration, trace.directory, trace.max_bytes)
                await self._speak(migration, keeper)
                tasks.stop()
        finally:
            if trace.directory and trace.stages:
                record_stages(migration, trace.directory)
            ended = self._remember(migration, keeper) if migration.ended.is_set() else None
            with trio.CancelScope(shield=True):
                if await migration.close():
                    keeper.forget(ENDED)
            if ended:
                ended.told.update(comparison(migration))

    def _remember(self, migration: IncomingMigration, keeper: Keeper) -> Finished:
        """What is kept of the guest is let go; how it ended is kept instead, until the source knows."""
        ended = Finished(
            migration.name,
            migration.phase.value,
            migration.epoch,
            [token.hex() for token in (migration.token, migration.token_before) if token],
            migration.memory.pages,
            snapshot(migration),
            migration.owner,
        )
        if oldest := self.shared.registry.remember(ended):
            Keeper(self.shared.store, oldest.name).forget(ENDED)
        if ended.epoch:
            try:
                with handoff.memory_file("gmemd-ended", ended.record()) as fd:
                    keeper.keep(ENDED, fd)
            except KernelError as error:
                log.warning("a successor will not know how it ended: %s", error, extra={"migration": migration.name})
        keeper.forget_guest()
        return ended

    def _take_memory(self, asked: Handoff, fds: list[int]) -> Memory:
        """Checks what was handed over. Off the event loop: a large file takes a while to look at."""
        limits = self.shared.config.limits
        if len(asked.regions) > limits.regions:
            raise HandoffError(f"{len(asked.regions)} regions (this daemon takes {limits.regions}): sent by the VMM")
        guestmemory.check_received(asked.regions, fds, limits.memory)
        if asked.faults is not None:
            guestmemory.check_faults(fds[asked.faults])
        memory = Memory(asked.migration, asked.regions, fds, fds)
        try:
            for index, region in enumerate(asked.regions):
                memory.set_populate(index, self.shared.chooser.choose(fds[region.file]))
        except GmemdError:
            memory.close()
            raise
        return memory

    def _migration(self, memory: Memory, keeper: Keeper, fds: list[int]) -> IncomingMigration:
        config = self.shared.config
        if config.trace.directory and config.trace.stages:
            memory.time_stages()

        def keep_state(state: bytes) -> None:
            with handoff.memory_file("gmemd-vmm-state", state) as fd:
                keeper.keep(BLOB, fd)

        migration = IncomingMigration(
            memory.migration,
            memory,
            self.shared.pager,
            self.shared.settings,
            self.shared.lane_threads,
            owner=self.caller.uid,
            state_limit=config.limits.state,
            keep_state=keep_state,
            keep_digests=lambda fd: keeper.keep(DIGESTS, fd),
            trace=config.trace.directory is not None,
        )
        if vcpus := memory.note(Note.VCPUS):
            migration.destination.set_vcpus(fds[memory.note(Note.FAULTS)], vcpus)
        return migration

    async def _speak(self, migration: IncomingMigration, keeper: Keeper) -> None:
        """Tells the VMM when its guest may run, and when the migration is over."""
        await migration.ready.wait()
        while migration.state is not None and migration.phase is not Phase.ABANDONED:
            try:
                await self._tell_ready(migration, migration.state)
            except KernelError as error:  # too many descriptors, no memory: it passes, and the guest waits for this
                log.error("the VMM's state: %s", error, extra={"migration": migration.name, "once": str(error)})
                await trio.sleep(SPACE_SECONDS)
                continue
            migration.state = None
            migration.memory.set_note(Note.SWITCHED, VMM_KNOWS)
            keeper.forget(BLOB)
        await migration.ended.wait()
        if migration.phase is Phase.COMPLETE:
            await self._tell({"done": True, "pages": migration.memory.pages})
        else:
            await self._tell({"abandoned": migration.why_abandoned})

    async def _tell_ready(self, migration: IncomingMigration, state: bytes) -> None:
        trap, populate = migration.memory.trap, _populate(migration)
        with handoff.memory_file("gmemd-vmm-state", state) as fd:
            await self._tell({"ready": True, "state": 0, "trap": trap, "populate": populate}, [fd])

    async def _listen(self, migration: IncomingMigration) -> None:
        """What the VMM says later. That it closes its socket says nothing: its process may live on. A message is taken
        off the socket when it is answered, so that a successor finds one that is not."""
        while True:
            try:
                try:
                    data, descriptors = await handoff.receive(self.sock, socket.MSG_PEEK)
                    descriptors.close()
                    if not data:
                        return
                    await self._answer(migration, data)
                except GmemdError as error:
                    await self._tell({"error": str(error)})
                await self.sock.recv(1)  # takes all of the message
            except OSError as error:
                log.info("VMM: %s", error, extra={"migration": migration.name})
                return

    async def _answer(self, migration: IncomingMigration, data: bytes) -> None:
        asked: dict[str, Any] = {}
        try:
            asked = handoff.parse_untrusted(data)
            for some in handoff.ranges_untrusted(asked.get("discard"), migration.memory.regions):
                await trio.to_thread.run_sync(migration.destination.discard, *some, limiter=self.shared.lane_threads)
            answer: dict[str, object] = {"discarded": True}
        except GmemdError as error:
            answer = {"error": str(error)}
        number = asked.get("id")
        await self._tell(answer | ({"id": number} if type(number) is int else {}))

    async def _watch_process(self, migration: IncomingMigration) -> None:
        try:
            pidfd = _pidfd(self.sock)
        except ProcessLookupError:
            pass
        else:
            try:
                await trio.lowlevel.wait_readable(pidfd)
            finally:
                os.close(pidfd)
        if not migration.ended.is_set():
            log.warning("the VMM has died", extra={"migration": migration.name})
            migration.report.link = "the VMM has died"
            migration.end(Phase.ABANDONED)

    async def _tell(self, message: dict[str, object], fds: list[int] | None = None) -> None:
        try:
            await handoff.send(self.sock, message, fds or ())
        except OSError as error:
            log.info("VMM cannot be told %s: %s", message, error)


def _start(migration: IncomingMigration, kinds: list[int]) -> None:
    """Registers the memory; where guest_memfd is what the kernel does not take, says so."""
    try:
        migration.start()
    except KernelError as error:
        if error.errno == errno.EINVAL and lib.GM_GUEST_MEMFD in kinds:
            raise UnavailableError(
                f"this kernel does not let userfaultfd handle guest_memfd ({error}): run the guest on memfd, "
                "or run a kernel that has it (`make lab-kernel` builds one); `gmemd doctor` tells what this one can do"
            ) from None
        raise


def _take_digests(memory: Memory, fd: int) -> None:
    """Those of a predecessor. Without, pages that came under it are left out of the comparison; no guest waits."""
    try:
        memory.keep_digests(fd)
    except GmemdError as error:
        log.warning("%s", error, extra={"migration": memory.migration})


def _populate(migration: IncomingMigration) -> str:
    """The ways in which this guest's pages get their content, as one word if there is one."""
    return "+".join(sorted({how.value for how in migration.memory.populate.values()}))


def _pidfd(sock: trio.socket.SocketType) -> int:
    """A descriptor of the peer's process, which a successor to its number cannot be mistaken for."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError:
        pid = Caller.of(sock).pid
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except OSError as error:
        raise KernelError(f"process {pid} of the VMM cannot be watched: {error.strerror}", error.errno or 0) from None
