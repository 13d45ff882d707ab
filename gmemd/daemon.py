"""`gmemd serve`: the destination daemon. Owns the sockets, the pager's thread, and the order in which all ends."""

import grp
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import trio

from gmemd import admission, holder, notify, status
from gmemd.address import Address
from gmemd.callers import VmmRules
from gmemd.config import Config
from gmemd.errors import DataError, GmemdError, UnavailableError, reason
from gmemd.keeping import Kept, Stranded, sort_out, take_ends
from gmemd.listen import take_descriptors
from gmemd.metrics import collect
from gmemd.migrate.link import LinkSettings
from gmemd.native.destination import Pager
from gmemd.places import Places
from gmemd.populate import Chooser
from gmemd.registry import Finished, Registry
from gmemd.sources import SourceConnections
from gmemd.stopping import until_told
from gmemd.stranded import hold
from gmemd.vmms import HANDING_OFF, OF_ONE_USER, Shared, VmmConnection
from gmemd.watchdog import watch

log = logging.getLogger(__name__)

BACKLOG = 64
STATUS_SECONDS = 1.0
# Callers on the status socket at a time: in all, and of one user.
ASKERS, ASKERS_OF_USER = 64, 16
PAGER_THREAD = "gmemd-pager"  # as top -H shows it: at most 15 characters

Serve = Callable[[trio.socket.SocketType], Awaitable[None]]


class Daemon:
    """One daemon."""

    def __init__(self, config: Config, fd_store: Path | None = None) -> None:
        network, paging = config.network, config.paging
        settings = LinkSettings(
            heartbeat=network.heartbeat,
            dead_after=network.dead_after,
            handshake_timeout=network.handshake_timeout,
            checksum=paging.checksum,
            poll_us=paging.poll_us,
        )
        self.config = config
        self.registry = Registry(config.limits.migrations, config.limits.migrations_of_user)
        self.pager = Pager(paging.poll_us)
        self.notifier = notify.from_environment()
        self._watchdog = notify.watchdog_interval()
        self._handed = take_descriptors()
        self._holder: socket.socket | None = None
        store = self.notifier
        if fd_store:
            self._holder, kept = holder.take_back(fd_store, alone=True)
            self._handed |= kept
            store = notify.Notifier(str(fd_store))
        self.shared = Shared(
            config,
            settings,
            self.registry,
            self.pager,
            Chooser(paging.populate),
            store,
            trio.CapacityLimiter(paging.lane_threads or os.cpu_count() or 1),
            VmmRules(config),
            Places(HANDING_OFF, OF_ONE_USER),
        )
        self.sources = SourceConnections(
            self.registry, settings, network.max_connections, network.max_connections_of_peer
        )
        self._askers = Places(ASKERS, ASKERS_OF_USER)
        self._connections: trio.Nursery

    async def run(self) -> None:
        """Serves until it is told to stop."""
        listeners = self._listeners()
        for record in take_ends(self._handed):
            self._remember(record)
        kept, stranded = sort_out(self._handed, self.shared.store)
        self.registry.listen = _name(listeners[1][0])
        self.sources.admission = admission.for_listener(self.config, listeners[1][0].getsockname()[0])
        # Before we are ready: from then on, a signal means a clean end.
        with until_told():
            async with trio.open_nursery() as outer:
                outer.start_soon(self._run_pager)
                try:
                    async with trio.open_nursery() as self._connections:
                        for migration in kept:
                            await self._connections.start(self._resume, migration)
                        for left in stranded:
                            self._connections.start_soon(self._hold, left)
                        for listener, serve in listeners:
                            self._connections.start_soon(self._accept, listener, serve)
                        self._connections.start_soon(self._tell_status)
                        if self._watchdog:
                            self._connections.start_soon(watch, self.pager, self.notifier, self._watchdog)
                        self.notifier.ready()
                        log.info("ready, sources come to %s", self.registry.listen)
                finally:
                    self.notifier.stopping()
                    self.pager.stop()
        self.pager.close()

    def _remember(self, record: bytes) -> None:
        """How a migration ended under our predecessor."""
        try:
            self.registry.remember(Finished.read(record))
        except DataError as error:
            log.warning("kept descriptor: %s", error)

    async def _run_pager(self) -> None:
        """In a thread of its own, which is told when to end."""
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self.pager.run, thread_name=PAGER_THREAD, limiter=trio.CapacityLimiter(1))

    async def _tell_status(self) -> None:
        told = ""
        while True:
            await trio.sleep(STATUS_SECONDS)
            status.sample(self.registry)
            self.shared.store.catch_up()
            if (now := status.one_line(self.registry)) != told and self.notifier.status(now):
                told = now

    def _listeners(self) -> list[tuple[trio.socket.SocketType, Serve]]:
        """What was handed in by name, or else what the configuration says."""
        config = self.config.daemon

        def take(name: str, make: Callable[[], socket.socket]) -> trio.socket.SocketType:
            sock = socket.socket(fileno=self._handed.pop(name)[0]) if name in self._handed else make()
            sock.setblocking(False)
            return trio.socket.from_stdlib_socket(sock)

        listeners: list[tuple[trio.socket.SocketType, Serve]] = [
            (take("handoff", lambda: self._unix(config.socket, socket.SOCK_SEQPACKET)), self._serve_vmm),
            (take("source", lambda: _tcp(self.config.network.listen)), self._serve_source),
            (take("status", lambda: self._unix(config.status_socket, socket.SOCK_STREAM)), self._serve_status),
        ]
        if config.metrics or "metrics" in self._handed:
            from gmemd.scrape import Scrapes  # only where it is wanted

            scrapes = Scrapes(lambda: collect(self.registry, self.pager.turns))
            listeners.append((take("metrics", lambda: self._near(config.metrics)), scrapes.serve))
        return listeners

    def _near(self, where: Path | Address | None) -> socket.socket:
        assert where is not None
        return _tcp(where) if isinstance(where, Address) else self._unix(where, socket.SOCK_STREAM)

    def _unix(self, path: Path, kind: socket.SocketKind) -> socket.socket:
        config = self.config.daemon
        group = _group_id(self.config)
        sock = socket.socket(socket.AF_UNIX, kind)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(path, kind)
            old_umask = os.umask(0o777)
            try:
                sock.bind(str(path))
            finally:
                os.umask(old_umask)
            os.chown(path, -1, group)
            os.chmod(path, config.socket_mode)
            sock.listen(BACKLOG)
        except OSError as error:
            raise UnavailableError(f"cannot listen on {path}: {reason(error)}") from None
        return sock

    async def _accept(self, listener: trio.socket.SocketType, serve: Serve) -> None:
        with listener:
            while True:
                try:
                    connection, _ = await listener.accept()
                except OSError as error:  # too many descriptors, no memory: it passes, and guests wait for us meanwhile
                    log.warning("accept: %s", error.strerror, extra={"once": "accept", "every": 10.0})
                    await trio.sleep(STATUS_SECONDS)
                    continue
                self._connections.start_soon(isolated, serve, connection)

    async def _resume(self, kept: Kept, task_status: trio.TaskStatus[None]) -> None:
        """A migration that was kept for us. Whatever is wrong with it is no trouble of the others, and its guest
        waits."""
        resumed = trio.Event()

        def tell() -> None:
            if not resumed.is_set():
                resumed.set()
                task_status.started()

        stranded = Stranded(kept.migration, "", kept.parts)
        try:
            with trio.socket.fromfd(kept.vmm, socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                await VmmConnection(self.shared, connection).resume(kept, tell)
            return
        except (GmemdError, OSError) as error:
            stranded = replace(stranded, why=str(error))
        except Exception as error:
            log.exception("a kept migration has failed, which is a bug of gmemd", extra={"migration": kept.migration})
            stranded = replace(stranded, why=repr(error))
        finally:
            tell()
            if not stranded.why:
                stranded.close()
        await self._hold(stranded)

    async def _hold(self, stranded: Stranded) -> None:
        try:
            await hold(stranded, self.registry, self.shared.store)
        finally:
            stranded.close()

    async def _serve_vmm(self, connection: trio.socket.SocketType) -> None:
        with connection:
            await VmmConnection(self.shared, connection).serve()

    async def _serve_source(self, connection: trio.socket.SocketType) -> None:
        await self.sources.serve(trio.SocketStream(connection))

    async def _serve_status(self, connection: trio.socket.SocketType) -> None:
        await status.serve(trio.SocketStream(connection), self.registry, self._askers)


async def isolated(serve: Serve, connection: trio.socket.SocketType) -> None:
    """A bug that one connection meets must not take the guests of the others with it, nor the daemon's clean end when
    it is met while all are being stopped."""
    try:
        await serve(connection)
    except BaseExceptionGroup as group:
        bugs, rest = group.split(Exception)
        _tell_bug(bugs, connection)
        if rest:
            raise rest from None
    except Exception as bug:
        _tell_bug(bug, connection)


def _tell_bug(bug: BaseException | None, connection: trio.socket.SocketType) -> None:
    if bug:
        log.error("a connection has failed, which is a bug of gmemd", exc_info=bug)
    connection.close()


def _tcp(address: Address) -> socket.socket:
    try:
        family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # [::] is every address of this host
        return socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        raise UnavailableError(f"cannot listen on {address}: {reason(error)}") from None


def _name(listener: trio.socket.SocketType) -> str:
    return str(Address.of(listener.getsockname()))


def _group_id(config: Config) -> int:
    """-1 is no change."""
    name = config.daemon.socket_group
    try:
        return grp.getgrnam(name).gr_gid if name else -1
    except KeyError:
        raise config.wrong("daemon", "socket_group", "no such group on this host: make it, or name another") from None


def _remove_stale(path: Path, kind: socket.SocketKind) -> None:
    """Removes a socket that a daemon left behind; UnavailableError if one still listens there."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, kind) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
    raise UnavailableError(f"{path}: another daemon listens there")
