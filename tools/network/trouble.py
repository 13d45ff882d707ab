"""Strikes a migration when its conditions say so."""

import random
from collections.abc import Awaitable, Callable, Mapping

import trio

from gmemd.migrate.tasks import Tasks
from gmemd_tools.network.conditions import Conditions, Trouble, When
from gmemd_tools.network.link import Link

LOOK_SECONDS = 0.05


class Troubles:
    """All troubles of these conditions. `others` are those that are not the link's own, by name."""

    def __init__(self, conditions: Conditions, link: Link, others: Mapping[str, Callable[[], Awaitable[None]]]) -> None:
        self.struck = 0
        self._conditions = conditions
        self._link = link
        self._others = others
        self._busy = trio.Lock()  # one at a time: a daemon that is being started cannot be killed

    def start(self, tasks: Tasks) -> None:
        """Each in a task, from now on."""
        for number, trouble in enumerate(self._conditions.troubles):
            tasks.start(self._wait_and_strike, trouble, random.Random(f"trouble {number} {self._conditions.seed}"))

    async def end(self) -> None:
        """No more from now on: what has begun is over."""
        await self._busy.acquire()

    async def _wait_and_strike(self, trouble: Trouble, rng: random.Random) -> None:
        await self._link.used.wait()
        while True:
            await self._until(trouble.when, rng)
            async with self._busy:
                self.struck += 1
                await self._strike(trouble)
            if trouble.when.every is None and trouble.when.file is None:
                return

    async def _until(self, when: When, rng: random.Random) -> None:
        if when.after is not None:
            await trio.sleep(when.after)
        elif when.every is not None:
            await trio.sleep(rng.expovariate(1 / when.every))
        elif when.byte is not None:
            passed = trio.Event()
            self._link.at(when.byte, passed.set)
            await passed.wait()
        elif when.file is not None:
            path = trio.Path(when.file)
            while not await path.exists():  # noqa: ASYNC110 (whoever makes it does not tell)
                await trio.sleep(LOOK_SECONDS)
            await path.unlink()

    async def _strike(self, trouble: Trouble) -> None:
        link = self._link
        own: dict[str, Callable[[], None]] = {
            "cut": link.cut,
            "truncate": link.truncate,
            "half-open": link.go_silent,
            "corrupt": lambda: link.corrupt(int(trouble.amount)),
            "lose": lambda: link.lose(int(trouble.amount)),
        }
        if trouble.kind == "stall":
            link.stall()
            await trio.sleep(trouble.amount)
            link.heal()
        elif trouble.kind in own:
            own[trouble.kind]()
        else:
            await self._others[trouble.kind]()
