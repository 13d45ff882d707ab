"""Progress of a source on a terminal."""

import trio
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from gmemd.migrate.source import OutgoingMigration

REFRESH_SECONDS = 0.2


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
