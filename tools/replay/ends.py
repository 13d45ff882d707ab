"""The daemon and the source of a replay: two processes, what lies between them, and what can happen to them."""

import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from gmemd import status
from gmemd.errors import GmemdError, UnavailableError
from gmemd.migrate.tasks import Tasks, open_tasks
from gmemd.stages import SUFFIX
from gmemd_tools.demo.processes import LATE, Process, Stage
from gmemd_tools.network.conditions import Conditions
from gmemd_tools.network.link import Link
from gmemd_tools.network.namespace import open_namespace
from gmemd_tools.network.trouble import Troubles
from gmemd_tools.replay.setup import Setup

MIGRATION = "replay"
READY_SECONDS = 30.0
READ_BYTES = 4096


@dataclass
class Ends:
    """Both ends. `listen` is where the daemon does, `to` where the source finds it, which may be a link's port.

    `handoff` is where a VMM finds the daemon, `content` what the source is told of where it gets memory from; both are
    in the stage's folder unless said otherwise. With `apart`, what a terminal sends does not reach the processes.
    """

    stage: Stage
    setup: Setup
    migration: str = MIGRATION
    handoff: Path | None = None
    content: str = ""
    apart: bool = False
    listen: str = "127.0.0.1:0"
    to: str = ""
    daemon: Process = field(init=False)
    source: Process = field(init=False)
    troubles: Troubles = field(init=False)
    _tasks: Tasks = field(init=False)
    _prefix: tuple[str, ...] = ()  # of the source's command
    _restarted: bool = False

    @property
    def daemon_socket(self) -> Path:
        return self.handoff or self.stage.directory / "gmemd.sock"

    @property
    def source_socket(self) -> Path:
        return self.stage.directory / "source.sock"

    @asynccontextmanager
    async def joined(self) -> AsyncIterator[None]:
        """With the daemon, and the network before it."""
        conditions = self.setup.network or Conditions()
        async with AsyncExitStack() as stack:
            if conditions.kernel:
                namespace = await stack.enter_async_context(open_namespace(conditions))
                self._prefix, self.listen = namespace.prefix, f"{namespace.host}:0"
            await self.start_daemon()
            self.to = self.listen
            link = Link(int(self.listen.rpartition(":")[2]), conditions)
            tasks = await stack.enter_async_context(open_tasks())
            if self.setup.network and not conditions.kernel:
                await tasks.serve(link.run)
                self.to = f"127.0.0.1:{link.port}"
            others = {"daemon-kill": self.kill_daemon, "source-kill": self.kill_source}
            self.troubles = Troubles(conditions, link, others)
            yield
            tasks.stop()

    async def start_daemon(self) -> None:
        """Starts it and waits until it is ready, as a service manager would."""
        path = self.stage.directory / "notify.sock"
        path.unlink(missing_ok=True)
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            await notify.bind(str(path))
            command = [
                *self._program("gmemd", "gmemd.cli"),
                "serve",
                f"--config={self._write_config()}",
                *self._store(),
            ]
            self.daemon = await self.stage.start(
                "daemon", command, environ={"NOTIFY_SOCKET": str(path)}, apart=self.apart
            )
            async with open_tasks() as tasks:
                tasks.start(until_ended, self.daemon)
                with limit("the daemon does not start"):
                    while b"READY=1" not in await notify.recv(READ_BYTES):
                        pass
                tasks.stop()
        self.listen = str((await self._ask())["listen"])

    async def start_source(self, tasks: Tasks) -> None:
        """One of `tasks` raises why it ends, if that is not because it is done, or was killed by us."""
        self._tasks = tasks
        command = [
            *self._prefix,
            *self._program("gmemd-source", "gmemd.source_cli"),
            self.to,
            f"--migration={self.migration}",
            self.content or f"--vmm={self.source_socket}",
            *(["--tls=off", "--plain-text-on-network"] if self._prefix else []),  # which does not leave this host
            "--json",
            *(["--no-background", "--ahead=0"] if self.setup.on_demand else []),
            *([f"--stages={self.setup.stages / 'source'}{SUFFIX}"] if self.setup.stages else []),
            *self.setup.source_arguments,
        ]
        self.source = await self.stage.start("source", command, apart=self.apart)
        self._tasks.start(self._until_ended_by_itself, self.source)

    async def kill_daemon(self) -> None:
        await self.daemon.kill()
        await self.start_daemon()

    async def kill_source(self) -> None:
        self._restarted = True
        await self.source.kill()
        await self.start_source(self._tasks)

    async def ask(self) -> dict[str, Any]:
        """What the daemon tells of the migration; nothing while it does not."""
        try:
            told = await self._ask()
        except GmemdError:
            return {}
        return next((dict(m) for m in told["migrations"] + told["finished"]), {})

    async def _ask(self) -> dict[str, Any]:
        path = self.stage.directory / "status.sock"
        return await trio.to_thread.run_sync(status.ask, path, {"command": "status"})

    async def _until_ended_by_itself(self, process: Process) -> None:
        try:
            await until_ended(process)
        except GmemdError:
            if process.told_to_end or (self._restarted and LATE.search(process.last_words())):
                return
            if not self._spoilt or process.process.returncode != os.EX_PROTOCOL:
                raise
            self._restarted = True
            await self.start_source(self._tasks)  # as a service manager would

    @property
    def _spoilt(self) -> bool:
        return self.setup.network is not None and self.setup.network.spoils

    def _program(self, name: str, module: str) -> list[str]:
        programs = self.setup.programs
        if programs is None:
            return [sys.executable, "-m", module]
        found = [path for path in (programs / "bin" / name, programs / name) if path.is_file()]
        if not found:
            raise UnavailableError(f"{programs}: no {name} in it")
        return [str(found[0])]

    def _store(self) -> list[str]:
        """What a daemon that is killed leaves to the next one: kept only if one will be."""
        troubles = self.setup.network.troubles if self.setup.network else ()
        kept = any(trouble.kind == "daemon-kill" for trouble in troubles)
        return [f"--fd-store={self.stage.directory / 'store.sock'}"] if kept else []

    def _write_config(self) -> Path:
        """The daemon's configuration: the settings asked for, and where it shall listen here."""
        ours: dict[str, dict[str, Any]] = {
            "daemon": {
                "socket": str(self.daemon_socket),
                "status_socket": str(self.stage.directory / "status.sock"),
            },
            "network": {"listen": self.listen},
        }
        if self._prefix:  # the addresses of a namespace are not loopback ones, but nothing leaves this host
            ours["network"] |= {"tls": "off", "plain_text_on_network": True}
        if self.setup.stages:
            ours["trace"] = {"directory": str(self.setup.stages), "stages": True}
        path = self.stage.directory / "gmemd.toml"
        with path.open("w") as file:
            for table in {**self.setup.settings, **ours}:
                file.write(f"[{table}]\n")
                for key, value in {**self.setup.settings.get(table, {}), **ours.get(table, {})}.items():
                    file.write(f"{key} = {json.dumps(value)}\n")  # for our kinds of value the same as in TOML
        return path


@contextmanager
def limit(problem: str) -> Iterator[None]:
    """Raises UnavailableError for what takes too long."""
    with trio.move_on_after(READY_SECONDS) as scope:
        yield
    if scope.cancelled_caught:
        raise UnavailableError(f"{problem} in {READY_SECONDS:.0f} s")


async def until_ended(process: Process) -> None:
    """Raises what it said last if it ends without a result."""
    await process.result()
