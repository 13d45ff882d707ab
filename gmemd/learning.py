"""Learns at a source which pages its guest asks for, so that they are sent first the next time."""

import logging
from pathlib import Path

import trio

from gmemd import order
from gmemd.errors import GmemdError
from gmemd.migrate.source import OutgoingMigration
from gmemd.trace import TraceWriter

log = logging.getLogger(__name__)

DRAIN_SECONDS = 0.1


class Learner:
    """For one migration. What cannot be learnt is a warning, and nothing else."""

    def __init__(self, path: Path, migration: OutgoingMigration) -> None:
        self._path = path
        self._new = path.with_name(f".{path.name}.new")
        self._migration = migration
        migration.source.learn()

    async def run(self) -> None:
        """Writes requests down until cancelled."""
        try:
            with TraceWriter(self._new, self._migration.to.migration, self._migration.memory.regions) as writer:
                try:
                    while True:
                        await trio.sleep(DRAIN_SECONDS)
                        writer.add(self._migration.source.asked())
                finally:
                    writer.add(self._migration.source.asked())
        except OSError as error:
            log.warning("%s: nothing is learnt: %s", self._path, error)

    def keep(self) -> None:
        """The migration is over: what was new is added to what was known."""
        known = [self._path] if self._path.exists() else []
        try:
            order.merge([*known, self._new], self._path)
            self._new.unlink()
        except (GmemdError, OSError) as error:
            log.warning("nothing is learnt: %s", error)
