"""Records the faults of a VMM that is not ours: as the handler that it hands its memory to.

Pages come only when they are asked for, so that every first touch is a fault. At the end all the others are sent, and
the VMM needs us no more.
"""

import logging
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from gmemd.errors import AbandonedError, GmemdError, UnavailableError
from gmemd.migrate.tasks import open_tasks
from gmemd.trace import segments
from gmemd_tools.demo.processes import open_stage
from gmemd_tools.replay.ends import Ends
from gmemd_tools.replay.recording import Recording, load
from gmemd_tools.replay.setup import Setup

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Handler:
    """`content` is what gmemd-source is told of where the memory is; `seconds` how long to record from the moment when
    the guest runs, None until SIGINT or SIGTERM."""

    socket: Path
    content: str
    migration: str
    traces: Path
    seconds: float | None
    source_arguments: Sequence[str] = ()

    def record(self) -> Recording:
        """Returns what was recorded, once the VMM has everything, or has gone."""
        before = self._files()
        with tempfile.TemporaryDirectory(prefix="gmemd-record-") as directory:
            trio.run(self._record, Path(directory))
        return load([path for path in self._files() if path not in before])

    async def _record(self, directory: Path) -> None:
        setup = Setup(
            on_demand=True,
            settings={"trace": {"directory": str(self.traces)}},
            source_arguments=self.source_arguments,
        )
        async with open_stage(directory) as stage:
            ends = Ends(stage, setup, migration=self.migration, handoff=self.socket, content=self.content, apart=True)
            async with ends.joined():
                log.info("a VMM may hand its memory over on %s", self.socket)
                try:
                    await self._serve(ends)
                except GmemdError:
                    if ends.source.process.returncode != AbandonedError.exit_code:
                        raise
                    log.info("the VMM has gone; what it touched until then is recorded")

    async def _serve(self, ends: Ends) -> None:
        """Until the source has sent everything."""
        async with open_tasks() as tasks:
            await ends.start_source(tasks)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_at_the_end, ends, nursery.cancel_scope)
                nursery.start_soon(self._cancel_when_late, ends, nursery.cancel_scope)
                with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                    await anext(signals)
                nursery.cancel_scope.cancel()
            if not await ends.ask():
                raise UnavailableError(f"{self.socket}: no VMM has handed its memory over")
            if ends.source.process.returncode is None:
                ends.setup = replace(ends.setup, on_demand=False)
                await ends.kill_source()

    async def _cancel_when_late(self, ends: Ends, scope: trio.CancelScope) -> None:
        if self.seconds is None:
            return
        while (await ends.ask()).get("phase") != "running":  # noqa: ASYNC110 (the daemon is asked, it does not tell)
            await trio.sleep(LOOK_SECONDS)
        await trio.sleep(self.seconds)
        scope.cancel()

    def _files(self) -> list[Path]:
        """Of this name, oldest first."""
        if not self.traces.is_dir():
            return []
        return list(segments(self.traces / f"{self.migration}.gmtrace").values())


async def _cancel_at_the_end(ends: Ends, scope: trio.CancelScope) -> None:
    await ends.source.process.wait()
    scope.cancel()
