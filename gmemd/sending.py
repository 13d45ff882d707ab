"""Where a source gets guest memory from: a VMM that hands it over, or a file."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import trio

from gmemd import guestmemory, handoff
from gmemd.errors import DataError, HandoffError, UnavailableError
from gmemd.handoff import Descriptors
from gmemd.migrate.source import Guest
from gmemd.native.memory import Memory, Region

SEQPACKET = trio.socket.SOCK_SEQPACKET
# A VMM's own state: registers and devices, some megabytes at most.
MAX_STATE = 64 << 20
ANSWER_SECONDS = 30.0


class SendingGuest(Guest, Protocol):
    """A guest with its memory."""

    def memory(self, migration: str) -> Memory:
        """Its memory, for one OutgoingMigration, which closes it."""

    async def done(self) -> None:
        """The destination has everything."""

    async def failed(self, why: str, *, resume: bool) -> None:
        """It failed; with `resume` the guest never left."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class FileGuest:
    """Memory in a file, with nobody running on it."""

    def __init__(self, path: Path, gpa: int) -> None:
        self._path = path
        self._gpa = gpa
        self._fd = -1

    async def __aenter__(self) -> Self:
        try:
            # O_NONBLOCK: what is no file is told below, and not waited for.
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise DataError(f"{self._path}: {error.strerror}") from None
        return self

    async def __aexit__(self, *_: object) -> None:
        os.close(self._fd)

    def memory(self, migration: str) -> Memory:
        info = os.fstat(self._fd)
        if not stat.S_ISREG(info.st_mode):
            raise DataError(f"{self._path}: not a file that holds memory")
        _, page_size = guestmemory.kind_of(self._fd)
        if not info.st_size or info.st_size % page_size:
            raise DataError(f"{self._path}: {info.st_size} bytes, not whole pages of {page_size}")
        region = Region(offset=0, size=info.st_size, page_size=page_size, gpa=self._gpa)
        memory = Memory(migration, [region], [self._fd])
        guestmemory.map_unreadable(memory, [region], [self._fd])
        return memory

    async def pause(self) -> bytes:
        return b""

    async def done(self) -> None: ...

    async def failed(self, why: str, *, resume: bool) -> None: ...


class VmmGuest:
    """A VMM on its hand-off socket, as docs/handoff.md has it."""

    def __init__(self, path: Path, migration: str) -> None:
        self._path = path
        self._migration = migration
        self._socket = trio.socket.socket(trio.socket.AF_UNIX, SEQPACKET)
        self._descriptors = Descriptors()
        self._regions: Sequence[Region] = ()

    async def __aenter__(self) -> Self:
        try:
            await self._socket.connect(os.fspath(self._path))
            answer, self._descriptors = await self._ask({"gmemd": handoff.VERSION, "send": self._migration})
            count = len(self._descriptors.fds)
            self._regions = handoff.regions_untrusted(answer, count, handoff.REGION_KEYS)
            guestmemory.check_sent(self._regions, self._descriptors.fds)
        except OSError as error:
            self._close()
            raise UnavailableError(f"{self._path}: {error.strerror or error}") from None
        except BaseException:
            self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        self._descriptors.close()
        self._socket.close()

    def memory(self, migration: str) -> Memory:
        memory = Memory(migration, self._regions, self._descriptors.fds)
        guestmemory.map_unreadable(memory, self._regions, self._descriptors.fds)
        return memory

    async def pause(self) -> bytes:
        answer, descriptors = await self._ask({"pause": True})
        try:
            if answer.get("paused") is not True:
                raise HandoffError(f"{self._path}: no answer to pause: {handoff.shown(answer)}: sent by the VMM")
            return _state(answer, descriptors.fds)
        finally:
            descriptors.close()

    async def done(self) -> None:
        await self._tell({"done": True})

    async def failed(self, why: str, *, resume: bool) -> None:
        await self._tell({"error": why} | ({"resume": True} if resume else {}))

    async def _tell(self, message: dict[str, Any]) -> None:
        with trio.move_on_after(ANSWER_SECONDS, shield=True):
            try:
                await handoff.send(self._socket, message)
            except OSError:
                return  # a VMM that has gone needs no telling

    async def _ask(self, message: dict[str, Any]) -> tuple[dict[str, Any], Descriptors]:
        descriptors = Descriptors()
        try:
            with trio.fail_after(ANSWER_SECONDS):
                await handoff.send(self._socket, message)
                data, descriptors = await handoff.receive(self._socket)
            if not data:
                raise UnavailableError(f"{self._path}: the VMM hung up")
            answer = handoff.parse_untrusted(data)
            if "error" in answer:
                raise HandoffError(f"{self._path}: {handoff.shown(answer['error'])}: sent by the VMM")
            return answer, descriptors
        except trio.TooSlowError:
            raise UnavailableError(f"{self._path}: the VMM does not answer") from None
        except OSError as error:
            raise UnavailableError(f"{self._path}: {error.strerror or error}") from None
        except BaseException:
            descriptors.close()
            raise


def _state(answer: dict[str, Any], fds: Sequence[int]) -> bytes:
    index = answer.get("state")
    if index is None:
        return b""
    if type(index) is not int or not 0 <= index < len(fds):
        raise HandoffError(f'"state" is {handoff.shown(index)}, of {len(fds)} descriptors: sent by the VMM')
    size = os.fstat(fds[index]).st_size
    if size > MAX_STATE:
        raise HandoffError(f"a state of {size} bytes ({MAX_STATE} at most): sent by the VMM")
    try:
        return handoff.content(fds[index])
    except OSError as error:
        raise HandoffError(f'"state" cannot be read: {error.strerror}: sent by the VMM') from None
