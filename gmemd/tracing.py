"""Writes a migration's faults to a trace while it runs."""

from pathlib import Path

import trio

from gmemd.migrate.destination import IncomingMigration
from gmemd.trace import TraceWriter

# The native ring holds half a second of the fastest faults that were seen.
DRAIN_SECONDS = 0.1


async def record(migration: IncomingMigration, directory: Path, max_bytes: int) -> None:
    """Drains the ring until cancelled, and once more then."""
    await trio.Path(directory).mkdir(parents=True, exist_ok=True)
    path = directory / f"{migration.name}.gmtrace"
    with TraceWriter(path, migration.name, migration.memory.regions, max_bytes) as writer:
        try:
            while True:
                await trio.sleep(DRAIN_SECONDS)
                writer.add(*migration.destination.trace())
        finally:
            writer.add(*migration.destination.trace())
