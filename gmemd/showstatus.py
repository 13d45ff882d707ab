"""`gmemd status`: what a daemon says of its migrations, for people."""

import json
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gmemd import status
from gmemd.errors import DataError, UnavailableError
from gmemd.show import show

REFRESH_SECONDS = 1.0
BAR_WIDTH = 24
LONG_WAIT_US = 1_000_000  # a page that takes longer is a trouble, no wait
WAITS_SHOWN = 8
THREADS_SHOWN = 8
UNITS = [(1_000_000, "s"), (1_000, "ms")]


def main(path: Path, *, as_json: bool, watch: bool) -> int:
    """Shows it once, or until interrupted: as JSON, one object a line."""
    answer = _ask(path)
    if as_json:
        print(json.dumps(answer), flush=True)
        while watch:
            time.sleep(REFRESH_SECONDS)
            print(json.dumps(_ask_again(path)), flush=True)
        return 0
    if not watch:
        show(render(answer))
        return 0
    with Live(render(answer), auto_refresh=False) as live:
        while True:
            time.sleep(REFRESH_SECONDS)
            live.update(render(_ask_again(path)), refresh=True)


def _ask(path: Path) -> dict[str, Any]:
    return status.ask(path, {"command": "status"})


def _ask_again(path: Path) -> dict[str, Any]:
    """Whoever watches wants to see the daemon come back after a restart."""
    try:
        return _ask(path)
    except UnavailableError as error:
        return {"error": str(error)}


def render(answer: dict[str, Any]) -> RenderableType:
    """All migrations, and those that have ended; or why nobody tells of them."""
    if "error" in answer:
        return Text(answer["error"], style="bold red")
    try:
        parts = [_migration(m) for m in answer["migrations"]]
        parts += [
            Text(f"{u['migration']}: cannot be taken over, its guest waits: {u['why']}", style="bold red")
            for u in answer["unusable"]
        ]
        parts += [
            Text(f"{w['migration']}: no VMM has come, and a source waits for it: {w['source']}")
            for w in answer.get("waiting", ())  # which older daemons do not tell
        ]
        if answer["finished"]:
            parts.append(_finished(answer["finished"]))
    except KeyError as error:
        raise DataError(f"a daemon of another version that does not tell {error}; --json shows what it does") from None
    return Group(*parts) if parts else Text("no migrations")


def _migration(m: dict[str, Any]) -> RenderableType:
    grid = Table.grid("", "", padding=(0, 2))
    for name, value in _rows(m):
        grid.add_row(Text(name, style="dim"), value)
    troubles = [Text(line, style="bold red") for line in _troubles(m)]
    return Group(_headline(m), grid, *troubles, Text())


def _headline(m: dict[str, Any]) -> RenderableType:
    line = Table.grid(padding=(0, 2))
    eta = "" if m["eta_s"] is None or m["phase"] == "complete" else f"{timedelta(seconds=round(m['eta_s']))} left"
    line.add_row(
        Text(m["migration"], style="bold"),
        m["phase"],
        ProgressBar(total=m["pages"], completed=m["pages_received"], width=BAR_WIDTH),
        f"{100 * m['progress']:.1f} % of {_size(m['memory_bytes'])}",
        f"{_size(m['rate_bytes_per_s'])}/s",
        eta,
    )
    return line


def _rows(m: dict[str, Any]) -> Iterator[tuple[str, str]]:
    counters, latency = m["counters"], m["fault_latency_us"]
    yield "faults", f"{counters['faults']}, {m['faults_per_s']:.0f}/s"
    if counters["faults"]:
        yield "latency", "  ".join(f"{name} {_time(latency[name])}" for name in ("p50", "p90", "p99", "p999", "max"))
    lanes = " ".join("urgent" if lane == 0 else str(lane) for lane in m["lanes"]) or "none"
    ktls = f" ({' and '.join(m['ktls'])} in the kernel)" if m["ktls"] else ""
    tls = f"; {m['tls']}{ktls} with {m['peer']}" if m["tls"] else ""
    yield "lanes", f"{lanes}; recoveries {m['recoveries']}{tls}"
    yield "way", f"trap {m['trap']}, populate {'+'.join(m['populate'])}"
    for place, wait in enumerate(m["waits"][:WAITS_SHOWN]):
        page = f"region {wait['region']}, page {wait['page']}"
        yield "" if place else f"waits {counters['waits']}", f"{_time(wait['for_us'])}  {_thread(wait)}  {page}"
    for place, thread in enumerate(m["threads"][:THREADS_SHOWN]):
        text = f"{_time(thread['blocked_us'])} in {thread['waits']} waits, longest {_time(thread['longest_us'])}"
        yield "" if place else "blocked", f"{_thread(thread)}  {text}"


def _thread(told: dict[str, Any]) -> str:
    if told["vcpu"]:
        return f"vCPU {told['thread']}"
    if not told["thread"]:
        return "some thread"  # its userfaultfd was made without UFFD_FEATURE_THREAD_ID
    return f"thread {told['thread']}{_name(told['thread'])}"


def _name(thread: int) -> str:
    """VMMs name their vCPU threads, and root may read that."""
    try:
        return f" ({Path(f'/proc/{thread}/comm').read_text().strip()})"
    except OSError:
        return ""


def _time(us: float) -> str:
    for size, unit in UNITS:
        if us >= size:
            return f"{us / size:.1f} {unit}"
    return f"{us:.0f} µs"


def _size(size: float) -> str:
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"


def _finished(ended: list[dict[str, Any]]) -> RenderableType:
    table = Table("ended", "how", "memory", "ran incomplete", "faults", "p99", "recoveries", box=None)
    for m in ended:
        table.add_row(
            m["migration"],
            m["phase"],
            _size(m["memory_bytes"]),
            f"{m['running_s']:.1f} s",
            str(m["counters"]["faults"]),
            _time(m["fault_latency_us"]["p99"]),
            str(m["recoveries"]),
        )
    return table


def _troubles(m: dict[str, Any]) -> Iterator[str]:
    if m["stuck"]:
        yield f"{m['stuck']} (for {_time(m['stuck_us'])})"
    if m["link"] and not m["lanes"]:
        yield f"no source: {m['link']}"
    if late := sum(wait["for_us"] > LONG_WAIT_US for wait in m["waits"]):
        yield f"{late} of the guest's threads wait for more than {_time(LONG_WAIT_US)}"
