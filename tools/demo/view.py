"""What a person sees of a demo."""

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.table import Table

MIB = 1 << 20


class Live:
    """A picture of the migration, drawn anew as it goes on; nothing when quiet."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self.quiet = quiet
        self._text = "starting"
        self._migration: dict[str, Any] = {}
        self._live = None if quiet else RichLive(console=console, transient=True, refresh_per_second=12)

    def say(self, text: str) -> None:
        """What happens now."""
        self._text = text
        self._draw()

    def migration(self, found: dict[str, Any]) -> None:
        """What the daemon tells of it."""
        self._migration = found
        self._draw()

    def _draw(self) -> None:
        if self._live is None:
            return
        table = Table.grid(padding=(0, 2))
        table.add_row("gmemd demo", self._text)
        if m := self._migration:
            counters, latency = m["counters"], m["fault_latency_us"]
            table.add_row("memory", ProgressBar(total=m["pages"], completed=m["pages_received"], width=50))
            table.add_row("", f"{m['pages_received']} of {m['pages']} pages are here")
            table.add_row("faults", f"{counters['faults']}, {counters['waits']} vCPUs wait")
            table.add_row("latency", f"p50 {latency['p50']:.0f} µs, p99 {latency['p99']:.0f} µs")
        self._live.update(table)

    def __enter__(self) -> Self:
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.__exit__(kind, error, trace)


def summary(s: dict[str, Any]) -> Table:
    """What it came to."""
    latency = s["fault_latency_us"]
    guest = "a KVM guest" if s["guest"] == "kvm" else "threads in place of vCPUs (no /dev/kvm here)"
    table = Table.grid(padding=(0, 2))
    table.add_row("guest", f"{guest}, {s['memory_bytes'] // MIB} MiB on {s['backing']}")
    table.add_row("downtime", f"{s['downtime_us'] / 1000:.1f} ms from the last instruction there to the first here")
    table.add_row("complete", f"{s['duration_us'] / 1e6:.2f} s later, while the guest ran")
    table.add_row(
        "pages",
        f"{s['background_pages']} in the background at {s['background_bytes_per_s'] / MIB:.0f} MiB/s, "
        f"{s['urgent_pages']} because the guest waited, {s['zero_pages']} zero",
    )
    table.add_row(
        "faults",
        f"{s['faults']}, answered in {latency['p50']:.0f} µs (p50), {latency['p99']:.0f} µs (p99), "
        f"{latency['max']:.0f} µs at most",
    )
    way = f"trap {s['trap']}, populate {s['populate']}, recoveries {s['recoveries']}, {s['tls'] or 'plain text'}"
    table.add_row("way", way)
    table.add_row(
        "checked",
        f"{s['pages_verified']} of {s['pages']} pages, {s['pages_as_at_source']} of them unchanged since the source, "
        f"{s['mismatches']} mismatches",
    )
    verdict = "[bold green]ok: every page is right" if s["ok"] else "[bold red]FAILED: guest memory is not right"
    table.add_row("", verdict)
    return table
