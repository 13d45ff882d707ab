"""Plays a recording against a daemon and a source, two processes with loopback TCP between them. We are their VMMs."""

import json
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from gmemd import status
from gmemd.errors import UnavailableError
from gmemd.migrate.tasks import open_tasks
from gmemd_tools.demo.processes import Process, Stage, open_stage
from gmemd_tools.replay import vmm
from gmemd_tools.replay.guest import Guest, Played
from gmemd_tools.replay.recording import Recording
from gmemd_tools.replay.result import result

MIGRATION = "replay"
DAEMON_SOCKET = "gmemd.sock"
STATUS_SOCKET = "status.sock"
SOURCE_SOCKET = "source.sock"
READY_SECONDS = 30.0
LAST_WORDS_SECONDS = 1.0
READ_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How to play: at `speed` times the recorded pace, None for flat out.

    With `on_demand`, nothing is sent but what is touched, and what no thread touched is touched at the end.
    `settings` are the daemon's, by table and key; `programs` is a folder with gmemd and gmemd-source of another build.
    """

    speed: float | None = 1.0
    on_demand: bool = False
    seed: int = 1
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    source_arguments: Sequence[str] = ()
    programs: Path | None = None

    @property
    def pace(self) -> float:
        """What the recorded gaps are multiplied with."""
        return 1 / self.speed if self.speed else 0.0


class Replay:
    """One run."""

    def __init__(self, recording: Recording, setup: Setup, directory: Path) -> None:
        self.recording = recording
        self.setup = setup
        self.directory = directory
        self.played: list[Played] = []
        self.status: dict[str, Any] = {}  # the daemon's, when everything was played
        self._all_played = trio.Event()

    async def run(self) -> dict[str, Any]:
        """Returns the result; raises what went wrong."""
        with Guest(self.recording.header.regions, self.setup.seed) as guest:
            await trio.to_thread.run_sync(guest.fill)
            async with open_stage(self.directory) as stage:
                daemon, port = await self._start_daemon(stage)
                try:
                    await self._receive(guest, stage, port)
                except UnavailableError:
                    with trio.move_on_after(LAST_WORDS_SECONDS):
                        await _until_ended(daemon)
                    raise
                verified = await trio.to_thread.run_sync(guest.verify)
        return result(self.recording, self.played, self.status, verified)

    async def _receive(self, guest: Guest, stage: Stage, port: int) -> None:
        """From the hand-off until all memory is here and everything was played."""
        with vmm.Receiver(guest, self.directory / DAEMON_SOCKET, MIGRATION) as receiver:
            await receiver.hand_over()
            async with open_tasks() as giving:
                giving.start(vmm.give, guest, await vmm.listen(self.directory / SOURCE_SOCKET))
                sender = await self._start_sender(stage, port)
                async with open_tasks() as tasks:
                    tasks.start(_until_ended, sender)
                    tasks.start(receiver.listen)
                    tasks.start(self._play, guest)
                    await self._watch(guest, receiver)
                giving.stop()

    async def _watch(self, guest: Guest, receiver: vmm.Receiver) -> None:
        try:
            with _limit("the daemon does not say ready"):
                await receiver.ready.wait()
            guest.ready()
            await self._all_played.wait()
            self.status = await self._ask_status()
            if self.setup.on_demand:
                await trio.to_thread.run_sync(_in_a_new_thread, guest.verify)  # which touches what is still missing
            await receiver.done.wait()
        finally:
            guest.stop()  # a thread that touches memory is not cancelled; it is told

    async def _play(self, guest: Guest) -> None:
        """Runs every thread of the recording, until they have done everything."""
        threads = self.recording.threads()
        limiter = trio.CapacityLimiter(len(threads))
        origin, pace = self.recording.origin_ns, self.setup.pace

        async def play(thread: int, accesses: bytearray) -> None:
            self.played.append(
                await trio.to_thread.run_sync(guest.play, thread, accesses, origin, pace, limiter=limiter)
            )

        async with open_tasks() as tasks:
            for thread, accesses in threads.items():
                tasks.start(play, thread, accesses)
        self._all_played.set()

    async def _start_daemon(self, stage: Stage) -> tuple[Process, int]:
        """Starts the daemon and waits until it is ready, as a service manager would. Returns it and its TCP port."""
        path = self.directory / "notify.sock"
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            await notify.bind(str(path))
            command = [*self._program("gmemd", "gmemd.cli"), "serve", f"--config={self._write_config()}"]
            daemon = await stage.start("daemon", command, environ={"NOTIFY_SOCKET": str(path)})
            async with open_tasks() as tasks:
                tasks.start(_until_ended, daemon)
                with _limit("the daemon does not start"):
                    while b"READY=1" not in await notify.recv(READ_BYTES):
                        pass
                tasks.stop()
        told = await self._ask()
        return daemon, int(told["listen"].rpartition(":")[2])

    async def _start_sender(self, stage: Stage, port: int) -> Process:
        command = [
            *self._program("gmemd-source", "gmemd.source_cli"),
            f"127.0.0.1:{port}",
            f"--migration={MIGRATION}",
            f"--vmm={self.directory / SOURCE_SOCKET}",
            "--json",
            *(["--no-background", "--ahead=0"] if self.setup.on_demand else []),
            *self.setup.source_arguments,
        ]
        return await stage.start("source", command)

    def _program(self, name: str, module: str) -> list[str]:
        if self.setup.programs:
            return [str(self.setup.programs / name)]
        return [sys.executable, "-m", module]

    def _write_config(self) -> Path:
        """The daemon's configuration: the settings asked for, and where it shall listen here."""
        ours = {
            "daemon": {
                "socket": str(self.directory / DAEMON_SOCKET),
                "status_socket": str(self.directory / STATUS_SOCKET),
            },
            "network": {"listen": "127.0.0.1:0"},
        }
        path = self.directory / "gmemd.toml"
        with path.open("w") as file:
            for table in {**self.setup.settings, **ours}:
                file.write(f"[{table}]\n")
                for key, value in {**self.setup.settings.get(table, {}), **ours.get(table, {})}.items():
                    file.write(f"{key} = {json.dumps(value)}\n")  # for our kinds of value the same as in TOML
        return path

    async def _ask_status(self) -> dict[str, Any]:
        """Of the migration."""
        told = await self._ask()
        (migration,) = told["migrations"] or told["finished"]
        return dict(migration)

    async def _ask(self) -> dict[str, Any]:
        path = self.directory / STATUS_SOCKET
        return await trio.to_thread.run_sync(status.ask, path, {"command": "status"})


def _in_a_new_thread(call: Callable[[], int]) -> int:
    """So that its faults are not one of the players' in a trace of the replay."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


@contextmanager
def _limit(problem: str) -> Iterator[None]:
    with trio.move_on_after(READY_SECONDS) as scope:
        yield
    if scope.cancelled_caught:
        raise UnavailableError(f"{problem} in {READY_SECONDS:.0f} s")


async def _until_ended(process: Process) -> None:
    """Raises what it said last if it ends without a result."""
    await process.result()


def replay(recording: Recording, setup: Setup) -> dict[str, Any]:
    """Plays a recording. Returns the result as `gmemd-replay run --json` prints it."""
    with tempfile.TemporaryDirectory(prefix="gmemd-replay-") as directory:
        return trio.run(Replay(recording, setup, Path(directory)).run)
