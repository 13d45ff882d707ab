"""`gmemd status`: what a daemon says of its migrations, for people."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gmemd import status

REFRESH_SECONDS = 1.0


def main(path: Path, *, as_json: bool, watch: bool) -> int:
    """Shows it once, or until interrupted."""
    answer = status.ask(path, {"command": "status"})
    if as_json:
        print(json.dumps(answer))
        return 0
    if not watch:
        Console().print(render(answer))
        return 0
    with Live(render(answer), auto_refresh=False) as live:
        while True:
            time.sleep(REFRESH_SECONDS)
            live.update(render(status.ask(path, {"command": "status"})), refresh=True)


def render(answer: dict[str, Any]) -> RenderableType:
    """All migrations."""
    if not answer["migrations"]:
        return Text("no migrations")
    table = Table("migration", "phase", "received", "faults", "p50", "p99", "waiting", "lanes", box=None)
    for m in answer["migrations"]:
        latency = m["fault_latency_us"]
        table.add_row(
            m["migration"],
            m["phase"],
            f"{100 * m['pages_received'] / m['pages']:.1f} %",
            str(m["counters"]["faults"]),
            f"{latency['p50']:.0f} µs",
            f"{latency['p99']:.0f} µs",
            str(m["counters"]["waits"]),
            str(len(m["lanes"])),
        )
    return Group(table, *(Text(line, style="bold red") for m in answer["migrations"] for line in _troubles(m)))


def _troubles(m: dict[str, Any]) -> list[str]:
    lines = []
    if m["stuck"]:
        lines.append(f"{m['migration']}: {m['stuck']}")
    if m["link"] and not m["lanes"]:
        lines.append(f"{m['migration']}: no source: {m['link']}")
    lines += [
        f"{m['migration']}: region {wait['region']}, page {wait['page']}: thread {wait['thread']} waits "
        f"for {wait['for_us'] / 1e6:.1f} s"
        for wait in m["waits"]
        if wait["for_us"] > 1_000_000
    ]
    return lines
