"""Migrations whose daemon is a process, and whose VMMs and sources are played here: guests are threads that touch
memory.

Whatever touches guest memory does so in a system call, which waits for a page without the GIL.
"""

import ctypes
import mmap
import os
import random
import socket
import struct
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import trio

from gmemd import handoff, holder, status
from gmemd.errors import GmemdError
from gmemd.migrate.link import LinkSettings
from gmemd.migrate.source import Destination, OutgoingMigration
from gmemd.native import check, ffi, lib
from gmemd.sending import FileGuest
from gmemd_tools.demo.cast import Cast
from gmemd_tools.demo.options import usual
from gmemd_tools.demo.plan import Plan
from gmemd_tools.demo.processes import empty_store, open_stage

PAGE = 4096
FEATURE_REMOVE = 1 << 3
LOOK_SECONDS = 0.01
_libc = ctypes.CDLL(None)


def content(page: int, seed: int = 0) -> bytes:
    """What a page holds at the source: never zero, and of one piece."""
    return struct.pack("<Q", (page + 1) << 32 | seed << 1 | 1) * (PAGE // 8)


def filled(pages: int, seed: int = 0) -> int:
    """A memory file of a source."""
    fd = os.memfd_create("source", os.MFD_CLOEXEC)
    for page in range(pages):
        os.pwrite(fd, content(page, seed), page * PAGE)
    return fd


def _remove(address: int, length: int) -> None:
    """Without the GIL, which mmap.madvise() would keep for as long as nobody reads the event."""
    assert _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), mmap.MADV_REMOVE) == 0


class Vmm:
    """A VMM at the destination, in this process."""

    def __init__(self, migration: str, pages: int, file: int | None = None) -> None:
        self.migration, self.pages = migration, pages
        self._stack = ExitStack()
        self.file = os.memfd_create("guest", os.MFD_CLOEXEC) if file is None else file
        self._stack.callback(os.close, self.file)
        if os.fstat(self.file).st_size < pages * PAGE:
            os.truncate(self.file, pages * PAGE)
        self.map = mmap.mmap(self.file, pages * PAGE)
        self._stack.callback(self._unmap)
        self.hva = int(ffi.cast("uintptr_t", ffi.from_buffer(self.map)))
        self.uffd = check(lib.gm_uffd_open, FEATURE_REMOVE)
        self._stack.callback(os.close, self.uffd)
        self._socket = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._stack.callback(self._socket.close)

    async def hand_over(self, path: Path) -> None:
        """Gives the daemon what it needs."""
        await self._socket.connect(str(path))
        region = {"file": 0, "offset": 0, "size": self.pages * PAGE, "page_size": PAGE, "gpa": 0, "hva": self.hva}
        message = {"gmemd": handoff.VERSION, "receive": self.migration, "regions": [region | {"uffd": 1}]}
        await handoff.send(self._socket, message, [self.file, self.uffd])

    async def hear(self) -> dict[str, Any]:
        """What the daemon says next; {} when it has hung up."""
        data, descriptors = await handoff.receive(self._socket)
        descriptors.close()
        return handoff.parse_untrusted(data) if data else {}

    async def tell(self, message: dict[str, Any]) -> None:
        await handoff.send(self._socket, message)

    def _read(self, page: int) -> bytes:
        fd = os.memfd_create("seen", os.MFD_CLOEXEC)
        try:
            with memoryview(self.map)[page * PAGE : (page + 1) * PAGE] as view:
                os.pwrite(fd, view, 0)
            return os.pread(fd, PAGE, 0)
        finally:
            os.close(fd)

    async def read(self, page: int, threads: trio.CapacityLimiter | None = None) -> bytes:
        """What the guest sees, once it sees it."""
        return await trio.to_thread.run_sync(self._read, page, limiter=threads, abandon_on_cancel=True)

    async def remove(self, page: int, count: int = 1) -> None:
        """The balloon takes pages out; returns when somebody has read of it."""
        await trio.to_thread.run_sync(_remove, self.hva + page * PAGE, count * PAGE)

    def resident(self) -> set[int]:
        """Pages that the memory file has."""
        found = set()
        at, size = 0, self.pages * PAGE
        while at < size:
            try:
                at = os.lseek(self.file, at, os.SEEK_DATA)
            except OSError:  # no more
                break
            end = os.lseek(self.file, at, os.SEEK_HOLE)
            found |= set(range(at // PAGE, end // PAGE))
            at = end
        return found

    def wrong(self, seed: int = 0) -> list[int]:
        """Pages that are not as at the source. When nothing is missing."""
        return [page for page in range(self.pages) if self._read(page) != content(page, seed)]

    def _unmap(self) -> None:
        """A thread that waited till the end is on its way out, and tells nobody."""
        while True:
            with suppress(BufferError):
                return self.map.close()
            time.sleep(0.001)

    def close(self) -> None:
        lib.gm_uffd_unregister(self.uffd, self.hva, self.pages * PAGE)
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Host:
    """The destination's host: a daemon that can be killed, with a holder beside it."""

    cast: Cast
    plan: Plan = field(init=False)

    def __post_init__(self) -> None:
        self.plan = self.cast.plan
        self.handoff = self.plan.directory / "gmemd.sock"
        self.store = self.plan.directory / "store.sock"

    @property
    def pid(self) -> int:
        return self.cast.daemon.process.pid

    @property
    def log(self) -> str:
        return self.cast.daemon.log.read_text()

    def kept(self) -> set[str]:
        """The names under which the holder keeps something now."""
        channel, found = holder.take_back(self.store)
        channel.close()
        for fds in found.values():
            for fd in fds:
                os.close(fd)
        return set(found)

    async def ask(self, **request: str) -> dict[str, Any]:
        return await trio.to_thread.run_sync(status.ask, self.plan.status_socket, request)

    async def told(self, migration: str) -> dict[str, Any]:
        """What the daemon says of a migration, running or ended; {} if it knows none of that name."""
        said = await self.ask(command="status")
        return next((m for m in said["migrations"] + said["finished"] if m["migration"] == migration), {})

    async def until(self, migration: str, **wanted: object) -> dict[str, Any]:
        """Waits until it is said so of the migration."""
        while True:
            try:
                told = await self.told(migration)
            except GmemdError:
                told = {}
            if told and all(told[key] == value for key, value in wanted.items()):
                return told
            await trio.sleep(LOOK_SECONDS)  # a status is asked for, it is not told

    @asynccontextmanager
    async def migration(
        self, name: str, pages: int, *, file: int | None = None, seed: int = 0
    ) -> AsyncIterator[tuple[Vmm, "Sender"]]:
        """A VMM that has handed over, and a source that has not begun."""
        with Vmm(name, pages, file) as vmm, Sender(name, pages, self.plan.port, seed) as sender:
            await vmm.hand_over(self.handoff)
            await self.until(name, phase="waiting")
            yield vmm, sender


@asynccontextmanager
async def open_host(
    folder: Path, *, populate: str = "auto", environ: dict[str, str] | None = None
) -> AsyncIterator[Host]:
    """A host whose daemon is ready."""
    plan = Plan(usual(populate=populate), folder)
    try:
        async with open_stage(folder) as stage:
            cast = Cast(plan, stage, environ=environ or {})
            await cast.start_daemon()
            yield Host(cast)
    finally:
        empty_store(plan.directory)


class Sender:
    """A source in this process."""

    def __init__(self, migration: str, pages: int, port: int, seed: int = 0) -> None:
        self.to = Destination("127.0.0.1", port, migration)
        self.fd = filled(pages, seed)

    async def run(
        self,
        *,
        port: int = 0,
        rate: int = 0,
        background: bool = True,
        lanes: int = 1,
        heartbeat: float = 0.3,
        verify: bool = False,
    ) -> OutgoingMigration:
        """Sends until the destination has everything. With a `port`, there is something in between."""
        to = Destination("127.0.0.1", port or self.to.port, self.to.migration, lanes, background, verify=verify)
        settings = LinkSettings(heartbeat=heartbeat)
        async with FileGuest(Path(f"/proc/self/fd/{self.fd}"), 0) as guest:
            migration = OutgoingMigration(to, guest.memory(to.migration), guest, settings)
            migration.source.set_rate(rate)
            try:
                await migration.run()
            finally:
                migration.close()
            return migration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def order(pages: int, rng: random.Random) -> Sequence[int]:
    """All pages, in an order of their own."""
    return rng.sample(range(pages), pages)
