"""Progress of a source: a bar on a terminal, and elsewhere a line for what holds it up."""

import logging

import trio
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from gmemd.migrate.source import OutgoingMigration

log = logging.getLogger(__name__)

REFRESH_SECONDS = 0.2
HELD_UP_SECONDS = 1.5  # twice; a daemon that restarts is back sooner


async def show_progress(migration: OutgoingMigration) -> None:
    """Draws a bar on stderr until cancelled."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(migration.progress.phase, total=migration.memory.size)
        while True:
            sent = migration.source.counters()
            pages = sent["background_pages"] + sent["urgent_pages"] + sent["zero_pages"]
            done = min(pages * migration.memory.size // migration.memory.pages, migration.memory.size)
            phase, trouble = migration.progress.phase, migration.progress.trouble
            bar.update(task, description=f"{phase}: {trouble}" if trouble else phase, completed=done)
            await trio.sleep(REFRESH_SECONDS)


async def tell_trouble(migration: OutgoingMigration) -> None:
    """For whoever sees no bar: what holds it up, when that lasts, once each. It goes on trying."""
    before = ""
    while True:
        await trio.sleep(HELD_UP_SECONDS)
        trouble = migration.progress.trouble or ""
        if trouble and trouble == before:
            log.warning("%s; still trying", trouble, extra={"once": (migration.to.migration, trouble)})
        before = trouble
