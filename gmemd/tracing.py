"""Writes a migration's faults to a trace while it runs."""

import logging
from pathlib import Path

import trio

from gmemd import stages
from gmemd.errors import GmemdError
from gmemd.migrate.destination import IncomingMigration
from gmemd.trace import TraceWriter

log = logging.getLogger(__name__)

# The native ring holds half a second of the fastest faults that were seen.
DRAIN_SECONDS = 0.1


async def record(migration: IncomingMigration, directory: Path, max_bytes: int) -> None:
    """Drains the ring until cancelled, and once more then. A disk that takes no more ends the trace, nothing else."""
    try:
        await _record(migration, directory / f"{migration.name}.gmtrace", max_bytes)
    except OSError as error:
        log.warning("the trace ends here: %s", error, extra={"migration": migration.name})


def record_stages(migration: IncomingMigration, directory: Path) -> None:
    """What was stamped of the latest faults."""
    try:
        stages.write(directory / f"{migration.name}{stages.SUFFIX}", migration.memory)
    except GmemdError as error:
        log.warning("no stages: %s", error, extra={"migration": migration.name})


async def _record(migration: IncomingMigration, path: Path, max_bytes: int) -> None:
    await trio.Path(path.parent).mkdir(parents=True, exist_ok=True)
    with TraceWriter(path, migration.name, migration.memory.regions, max_bytes) as writer:
        try:
            while True:
                await trio.sleep(DRAIN_SECONDS)
                writer.add(*migration.destination.trace())
        finally:
            writer.add(*migration.destination.trace())
