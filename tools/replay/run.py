"""Plays a recording against a daemon and a source, two processes with loopback TCP between them. We are their VMMs."""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from gmemd.errors import GmemdError
from gmemd.migrate.tasks import open_tasks
from gmemd_tools.demo.processes import empty_store, open_stage
from gmemd_tools.replay import runfile, staged, vmm
from gmemd_tools.replay.ends import MIGRATION, Ends, limit, until_ended
from gmemd_tools.replay.guest import Guest, Played
from gmemd_tools.replay.recording import Recording
from gmemd_tools.replay.result import result
from gmemd_tools.replay.setup import Setup

LAST_WORDS_SECONDS = 1.0
LOOK_SECONDS = 0.05


@dataclass
class Replay:
    """One run. `looks` are what the daemon told meanwhile, each with the time in ns, if somebody wants to know."""

    recording: Recording
    setup: Setup
    watched: bool = False
    played: list[Played] = field(default_factory=list)
    looks: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)  # the daemon's, when everything was played
    _all_played: trio.Event = field(default_factory=trio.Event)

    async def run(self, directory: Path) -> dict[str, Any]:
        """Returns the result; raises what went wrong."""
        with Guest(self.recording.header.regions, self.setup.seed) as guest:
            await trio.to_thread.run_sync(guest.fill)
            async with open_stage(directory) as stage:
                ends = Ends(stage, self.setup)
                async with ends.joined():
                    await self._migrate(guest, ends)
                verified = await trio.to_thread.run_sync(guest.verify)
        return result(self.recording, self.played, self.status, verified)

    async def _migrate(self, guest: Guest, ends: Ends) -> None:
        try:
            await self._receive(guest, ends)
        except GmemdError:
            with trio.move_on_after(LAST_WORDS_SECONDS):
                await until_ended(ends.daemon)
            raise

    async def _receive(self, guest: Guest, ends: Ends) -> None:
        """From the hand-off until all memory is here and everything was played."""
        with vmm.Receiver(guest, ends.daemon_socket, MIGRATION) as receiver:
            await receiver.hand_over()
            async with open_tasks() as giving:
                giving.start(vmm.give, guest, await vmm.listen(ends.source_socket))
                async with open_tasks() as tasks:
                    await ends.start_source(tasks)
                    tasks.start(receiver.listen)
                    tasks.start(self._play, guest)
                    async with open_tasks() as meanwhile:
                        ends.troubles.start(meanwhile)
                        if self.watched:
                            meanwhile.start(self._look, ends)
                        await self._watch(guest, receiver, ends)
                        await ends.troubles.end()
                        meanwhile.stop()
                giving.stop()

    async def _watch(self, guest: Guest, receiver: vmm.Receiver, ends: Ends) -> None:
        try:
            with limit("the daemon does not say ready"):
                await receiver.ready.wait()
            guest.ready()
            await self._all_played.wait()
            self.status = await ends.ask()
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

    async def _look(self, ends: Ends) -> None:
        while True:
            if told := await ends.ask():
                self.looks.append((time.monotonic_ns(), told))
            await trio.sleep(LOOK_SECONDS)


def _in_a_new_thread(call: Callable[[], int]) -> int:
    """So that its faults are not one of the players' in a trace of the replay."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def replay(recording: Recording, setup: Setup, keep: Path | None = None) -> dict[str, Any]:
    """Plays a recording. Returns the result as `gmemd-replay run --json` prints it; the whole run goes to `keep`."""
    with tempfile.TemporaryDirectory(prefix="gmemd-replay-") as name:
        directory = Path(name)
        if keep and not setup.programs:  # whose stages may be others
            setup = dataclasses.replace(setup, stages=directory)
        played = Replay(recording, setup, watched=keep is not None)
        try:
            found = trio.run(played.run, directory)
        finally:
            empty_store(directory)
        if setup.stages:
            found["stages"] = staged.told(setup.stages, recording, played.played)
    if keep:
        runfile.write(keep, found, recording, played.played, played.looks)
    return found
