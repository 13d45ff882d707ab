"""The migrations of a daemon by name, and those who wait for one."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trio

from gmemd.errors import HandoffError
from gmemd.migrate.destination import IncomingMigration

# Migrations that are remembered after their end, for an operator who asks how it went.
FINISHED = 16


class Registry:
    """Knows every migration from its hand-off until its VMM has let go of it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.listen = ""  # where sources come to
        self.finished: deque[dict[str, Any]] = deque(maxlen=FINISHED)  # what there was to tell of the latest
        self._names: set[str] = set()
        self._migrations: dict[str, IncomingMigration] = {}
        self._arrivals = trio.Condition()

    def __iter__(self) -> Iterator[IncomingMigration]:
        return iter(list(self._migrations.values()))

    def get(self, name: str) -> IncomingMigration | None:
        return self._migrations.get(name)

    @contextmanager
    def reserved(self, name: str) -> Iterator[None]:
        """Takes a name and a place before the work of setting up begins."""
        if name in self._names:
            raise HandoffError(f"migration {name}: another VMM receives it already: sent by the VMM")
        if len(self._names) >= self.limit:
            raise HandoffError(f"migration {name}: this daemon has {self.limit} migrations already, its limit")
        self._names.add(name)
        try:
            yield
        finally:
            self._names.remove(name)
            self._migrations.pop(name, None)

    async def add(self, migration: IncomingMigration) -> None:
        """A source may have it from now on."""
        self._migrations[migration.name] = migration
        async with self._arrivals:
            self._arrivals.notify_all()

    async def arrival(self, name: str) -> IncomingMigration:
        """The migration, once its VMM has come."""
        async with self._arrivals:
            while name not in self._migrations:
                await self._arrivals.wait()
            return self._migrations[name]
