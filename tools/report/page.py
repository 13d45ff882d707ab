"""One or two runs as one HTML file that needs nothing else, and as PNGs."""

import io
import logging
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

import matplotlib as mpl
from matplotlib.figure import Figure

from gmemd.errors import DataError
from gmemd_tools.replay.comparison import FIGURES
from gmemd_tools.replay.runfile import Run
from gmemd_tools.report.data import Data, data_of
from gmemd_tools.report.panels import PANELS, STYLE

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of its caches

PNG_DPI = 130
RASTER_DPI = 150
# Of each figure that is compared: what people call it, what it is divided by, and its unit.
CALLED = {
    "faults": ("accesses that had to wait", 1, ""),
    "asked_pages": ("pages that were asked for", 1, ""),
    "fault_p50_us": ("a wait, in the middle (p50)", 1, "µs"),
    "fault_p99_us": ("a wait, 1 of 100 (p99)", 1e3, "ms"),
    "fault_max_us": ("the longest wait", 1e3, "ms"),
    "waited_us": ("waited in all, by all threads", 1e3, "ms"),
    "settled_us": ("until the guest waited no more", 1e3, "ms"),
    "duration_us": ("until all accesses were done", 1e3, "ms"),
}
TITLES = {
    "map": "Where and when",
    "latency": "How long",
    "stages": "Where the time of a fault goes",
    "progress": "Progress",
    "vcpus": "Who waited",
}
HEADLINE = ("faults", "fault_p50_us", "fault_p99_us", "settled_us")
PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>gmemd: $title</title>
<meta name="viewport" content="width=device-width">
<style>
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2733; background: #fff; max-width: 1120px; margin: 24px auto;
  padding: 0 20px }
h1 { font-size: 22px; margin: 0 }
h2 { font-size: 15px; margin: 28px 0 2px }
p { margin: 4px 0 8px; color: #4a5867 }
.verdict { font-size: 17px; color: #1c2733; margin: 8px 0 16px }
.bad { color: #b00020 }
.figures { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px }
.figure { border: 1px solid #dde2e8; border-radius: 6px; padding: 10px 14px }
.figure b { display: block; font-size: 25px; font-weight: 600; font-variant-numeric: tabular-nums }
.figure .from { font-size: 14px; font-weight: 400; color: #c2570c }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { text-align: right; padding: 3px 14px 3px 0; border-bottom: 1px solid #edf0f3 }
td:first-child, th:first-child { text-align: left }
svg { width: 100%; height: auto }
</style></head><body>
<h1>$title</h1>
<p class="verdict$bad">$verdict</p>
<div class="figures">$figures</div>
$table
$panels
<p>$foot</p>
</body></html>
""")


def write(runs: Sequence[Run], html: Path, png: Path | None = None) -> None:
    """Writes the page, and one PNG a picture into the folder `png`. DataError if it cannot."""
    data = [data_of(run) for run in runs]
    with mpl.rc_context(STYLE):
        drawn = {name: (panel(data), text) for name, (panel, text) in PANELS.items()}
        panels = {name: (figure, text) for name, (figure, text) in drawn.items() if figure is not None}
        try:
            html.write_text(_page(data, panels), encoding="utf-8")
            if png:
                png.mkdir(parents=True, exist_ok=True)
                for name, (figure, _) in panels.items():
                    figure.savefig(png / f"{name}.png", dpi=PNG_DPI)
        except OSError as error:
            raise DataError(f"{error.filename or html}: {error.strerror}") from None


def _page(runs: Sequence[Data], panels: dict[str, tuple[Figure, str]]) -> str:
    ok = all(run.result["ok"] for run in runs)
    pictures = (
        f'<section id="{name}"><h2>{TITLES[name]}</h2><p>{escape(text)}</p>{_svg(name, figure)}</section>'
        for name, (figure, text) in panels.items()
    )
    return PAGE.substitute(
        title=escape(" → ".join(run.name for run in runs)),
        bad="" if ok else " bad",
        verdict=escape(_verdict(runs)),
        figures="".join(_figure(name, runs) for name in HEADLINE),
        table=_table(runs) if len(runs) > 1 else "",
        panels="\n".join(pictures),
        foot=escape("; ".join(_foot(run) for run in runs)),
    )


def _verdict(runs: Sequence[Data]) -> str:
    """What there is to know at a glance, in words."""
    last = runs[-1].result
    right = "every page was right" if all(run.result["ok"] for run in runs) else "NOT EVERY PAGE WAS RIGHT"
    share = last["faults"] / last["touches"]
    text = (
        f"{last['faults']} of {last['touches']} accesses ({share:.1%}) had to wait for a page, and after "
        f"{last['settled_us'] / 1e6:.2f} s none did any more; {right}."
    )
    if len(runs) == 1:
        return text
    first = runs[0].result
    waits = _change(first["faults"], last["faults"], "fewer")
    time = _change(first["settled_us"], last["settled_us"], "less")
    return f"{waits} waits, and {time} time until the last one: {text}"


def _change(before: float, after: float, less: str) -> str:
    if not before:
        return "as many" if not after else "more"
    if after > 2 * before:
        return f"{after / before:.1f} times the"
    return f"{abs(after / before - 1):.0%} {less if after < before else 'more'}"


def _told(name: str, run: Data) -> str:
    _, divisor, unit = CALLED[name]
    value = FIGURES[name](run.result) / divisor
    return f"{value:,.0f}" if not unit else f"{value:,.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


def _figure(name: str, runs: Sequence[Data]) -> str:
    before = f'<span class="from"> from {_told(name, runs[0])}</span>' if len(runs) > 1 else ""
    return f'<div class="figure"><b>{_told(name, runs[-1])}{before}</b>{escape(CALLED[name][0])}</div>'


def _table(runs: Sequence[Data]) -> str:
    heads = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    rows = "".join(
        f"<tr><td>{escape(called)}</td>{''.join(f'<td>{_told(name, run)}</td>' for run in runs)}"
        f"<td>{_percent(*(FIGURES[name](run.result) for run in runs))}</td></tr>"
        for name, (called, *_) in CALLED.items()
    )
    return f"<h2>Before and after</h2><table><tr><th></th>{heads}<th>change</th></tr>{rows}</table>"


def _percent(before: float, after: float) -> str:
    return f"{after / before - 1:+.0%}" if before else ""


def _foot(run: Data) -> str:
    result = run.result
    return (
        f"{run.name}: {result['pages_verified']} of {result['pages']} pages compared, {run.memory_mib:.0f} MiB, "
        f"{len(run.threads)} threads, trap {result['trap']}, populate {result['populate']}, "
        f"{result['daemon']['recoveries']} recoveries"
    )


def _svg(name: str, figure: Figure) -> str:
    """To stand in a page: names of groups, which nothing refers to, would be there more than once."""
    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", dpi=RASTER_DPI, metadata={"Date": None})
    text = file.getvalue()
    return re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
