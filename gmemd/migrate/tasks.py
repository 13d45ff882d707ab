"""Tasks that belong together: the first that fails ends the others, and its error comes out as it is, not in a
group."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio

from gmemd.errors import GmemdError


class Tasks:
    """A nursery for tasks that may fail with a GmemdError. Anything else that they raise is a bug, and stays in its
    group."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.error: GmemdError | None = None
        self._nursery = nursery

    def start(self, task: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Runs `task(*args)` beside the others."""
        self._nursery.start_soon(self._guarded, task, args)

    async def serve(self, task: Callable[..., Awaitable[None]]) -> None:
        """Runs a task that says when it has started, and waits for that."""
        await self._nursery.start(task)

    @property
    def stopped(self) -> bool:
        """Whether they are to end: a nursery that has ended takes no more."""
        return self._nursery.cancel_scope.cancel_called

    def stop(self, error: GmemdError | None = None) -> None:
        """Ends all tasks, because of `error` if one is given."""
        self.error = self.error or error
        self._nursery.cancel_scope.cancel()

    async def _guarded(self, task: Callable[..., Awaitable[None]], args: tuple[Any, ...]) -> None:
        try:
            await task(*args)
        except GmemdError as error:
            self.stop(error)


@asynccontextmanager
async def open_tasks() -> AsyncIterator[Tasks]:
    """Waits at its end until all tasks are over, then raises what the first that failed did."""
    async with trio.open_nursery() as nursery:
        tasks = Tasks(nursery)
        try:
            yield tasks
        except GmemdError as error:
            tasks.stop(error)
    if tasks.error:
        raise tasks.error
