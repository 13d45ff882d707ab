"""The processes of a demo: started, heard, told, and ended, whatever happens."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from gmemd import config, errors, holder, notify
from gmemd.errors import DataError, GmemdError, UnavailableError
from gmemd_tools.vmm import VMM

READ_BYTES = 64 * 1024
STOP_SECONDS = 5.0
LONGEST_NAME = 16  # of a socket in a stage's directory, and the slash before it
# What a gmemd-source says that was started when all was over.
LATE = re.compile(r"ended here [0-9]+ s ago: complete$")


class Process:
    """A process whose stdout is JSON, an object a line, and whose stdin takes words."""

    def __init__(self, name: str, process: trio.Process, log: Path) -> None:
        self.name = name
        self.process = process
        self.log = log
        self.forgiving = False  # a VMM's that was told of a failed gmemd-source: another one will come
        self.told_to_end = False  # by us
        self._lines = bytearray()

    async def event(self, *names: str) -> dict[str, Any]:
        """The next event of one of these names; what went wrong is raised, others are passed over."""
        while True:
            event = await self._next()
            if event.get("event") in names:
                return event
            if event.get("event") == "mismatch":
                raise DataError(f"{self.name}: a wrong byte: {json.dumps(event)}")
            if event.get("event") == "failed" and self.forgiving:
                continue
            if event.get("event") in ("error", "refused", "failed", "abandoned"):
                raise UnavailableError(f"{self.name}: {event.get('message', event)}")

    async def result(self) -> dict[str, Any]:
        """The only object of a process that ends by itself."""
        result = await self._next()
        await self.process.wait()
        return result

    async def tell(self, *words: str) -> None:
        assert self.process.stdin is not None
        await self.process.stdin.send_all(" ".join(words).encode() + b"\n")

    async def _next(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while b"\n" not in self._lines:
            data = await self.process.stdout.receive_some(READ_BYTES)
            if not data:
                raise await self.why_ended()
            self._lines += data
        line, _, rest = bytes(self._lines).partition(b"\n")
        self._lines = bytearray(rest)
        try:
            return dict(json.loads(line))
        except ValueError:
            text = line.decode(errors="replace")
            raise UnavailableError(f"{self.name} says what is no event: {text}") from None

    async def why_ended(self) -> GmemdError:
        """Waits for its end. An error that was its own is ours, with the same exit code."""
        code = await self.process.wait()
        how = f"ended with {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
        return errors.by_exit_code(code)(f"{self.name} {how}: {self.last_words()}")

    async def kill(self) -> None:
        self.told_to_end = True
        self.process.kill()
        await self.process.wait()

    def last_words(self) -> str:
        """The end of its log."""
        return (self.log.read_text(errors="replace").strip().splitlines() or ["(it said nothing)"])[-1]


class Stage:
    """A directory for sockets and logs, and the processes that live in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.processes: list[Process] = []

    async def start(
        self, name: str, command: Sequence[str], environ: dict[str, str] | None = None, *, apart: bool = False
    ) -> Process:
        """Starts a process; its stderr goes to a file. One that is `apart` does not hear a terminal's Ctrl-C."""
        log = self.directory / f"{name}.log"
        with log.open("ab") as stderr:
            process = await trio.lowlevel.open_process(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=os.environ | (environ or {}),
                start_new_session=apart,
            )
        started = Process(name, process, log)
        self.processes.append(started)
        return started

    async def vmm(self, name: str, *arguments: str) -> Process:
        """A reference VMM, as source or destination."""
        return await self.start(name, [str(VMM), *arguments])

    async def python(self, name: str, module: str, *arguments: str, environ: dict[str, str] | None = None) -> Process:
        """A command of gmemd, with this Python."""
        return await self.start(name, [sys.executable, "-m", module, *arguments], environ)

    async def end(self, process: Process) -> None:
        """Asks it to end, and makes it."""
        process.told_to_end = True
        if process.process.returncode is None:
            process.process.terminate()
            with trio.move_on_after(STOP_SECONDS):
                await process.process.wait()
        if process.process.returncode is None:
            await process.kill()
        for stream in (process.process.stdin, process.process.stdout):
            if stream:
                await trio.aclose_forcefully(stream)


@asynccontextmanager
async def open_stage(directory: Path) -> AsyncIterator[Stage]:
    """Ends, at its end, every process that was started on it, the last one first."""
    if len(os.fsencode(directory)) + LONGEST_NAME > config.MAX_SOCKET_PATH:
        raise UnavailableError(f"{directory}: too long for the paths of sockets in it: set TMPDIR to a shorter one")
    stage = Stage(directory)
    try:
        yield stage
    finally:
        with trio.CancelScope(shield=True):
            for process in reversed(stage.processes):
                await stage.end(process)


def empty_store(directory: Path) -> None:
    """After a failure, the holder still keeps the guest for a daemon that will not come."""
    path = directory / "store.sock"
    if not path.exists():
        return
    channel, kept = holder.take_back(path)
    store = notify.Notifier(str(path))
    with channel:
        for name, fds in kept.items():
            store.remove(name)
            for fd in fds:
                os.close(fd)
