"""The daemon dies at each point of an install, several times, while the guest writes to what it was given a moment ago.

Every page of the guest says who wrote it last; a write that was undone, or a page taken for received too early, shows
at the end.
"""

import random
import signal
from pathlib import Path

import pytest

from gmemd.migrate.tasks import open_tasks
from gmemd_tools import tmpfs
from gmemd_tools.demo.cast import Cast
from gmemd_tools.demo.plan import Plan
from gmemd_tools.demo.processes import empty_store, open_stage
from gmemd_tools.soak.run import machine, sender_ended, until_known, verify

pytest_plugins = ["support.kill_points"]

POINTS = ("claimed", "half-populated", "populated", "marked", "continued")
LIVES = 3
# So slow that the guest asks for most pages itself, and writes to them as soon as it has them.
RATE = 4 << 20


class Doomed:
    """A cast whose daemon dies as often as there are lives, and is started again each time."""

    def __init__(self, cast: Cast, package: Path, point: str, lives: list[int]) -> None:
        self.cast = cast
        self.deaths = 0
        self._package, self._point, self._lives = package, point, lives
        self._next_life()

    def _next_life(self) -> None:
        self.cast.environ = {"PYTHONPATH": str(self._package), "PYTHONSAFEPATH": "1"}
        if self._lives:
            self.cast.environ["GM_KILL_POINT"] = f"{self._point}:{self._lives.pop()}"

    async def revive(self) -> None:
        while True:
            code = await self.cast.daemon.process.wait()
            assert code == -signal.SIGKILL, self.cast.daemon.log.read_text()
            self.deaths += 1
            self._next_life()
            await self.cast.start_daemon()


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("backing", ["memfd", "tmpfs"])
async def test_no_write_is_undone(
    point: str, backing: str, kill_points: Path, tmp_path: Path, rng: random.Random
) -> None:
    if backing == "tmpfs" and (missing := tmpfs.missing()):
        pytest.skip(missing)
    options = machine(rng)
    options.backing = backing
    options.populate = "write"
    plan = Plan(options, tmp_path, rate=RATE)
    try:
        async with open_stage(tmp_path) as stage:
            cast = Cast(plan, stage)
            doomed = Doomed(cast, kill_points, point, [rng.randrange(400) for _ in range(LIVES)])
            await cast.start_daemon()
            await cast.start_source()
            await cast.start_destination()
            await until_known(plan)
            async with open_tasks() as tasks:
                tasks.start(doomed.revive)
                await cast.start_sender()
                paused = await cast.source.event("paused")
                await cast.destination.event("done")
                await sender_ended(cast)
                tasks.stop()
            assert 1 < doomed.deaths <= LIVES  # the last life may see the end before its point
            await verify(cast.destination, paused["memory"])
    finally:
        empty_store(plan.directory)
