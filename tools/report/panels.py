"""The pictures of a report, each of one or two runs."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from gmemd_tools.report.data import MIB, Data, Numbers

COLOURS = ("#c2570c", "#1f5fbf")  # the first run's and the second's
QUIET = "#c9ced6"
WIDTH = 11.0  # inches
BINS = 60
RATE_BINS = 80
SHORTEST_US = 1.0
LABELLED = 0.03  # a stage with less of a fault has no room for its number
STEP_COLOURS = ("#4e79a7", "#f28e2b", "#76b7b2", "#e15759", "#59a14f", "#edc948", "#b07aa1", "#9c755f")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "legend.frameon": False,
}


def _new(height: float, rows: int = 1, columns: int = 1, *, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    return figure, list(axes.flat)


def _colours(runs: Sequence[Data]) -> Sequence[str]:
    """One run has the second colour, as the later one of two."""
    return COLOURS[-len(runs) :]


def _time(us: float, _: object = None) -> str:
    """As people say it."""
    for unit, name in ((1e6, "s"), (1e3, "ms")):
        if us >= unit:
            return f"{us / unit:g} {name}"
    return f"{us:g} µs"


def fault_map(runs: Sequence[Data]) -> Figure:
    """Every access by time and place; those that had to wait in the colour of how long."""
    figure, axes = _new(4.2, 1, len(runs), sharey=True)
    longest = max((run.waits.max() for run in runs if run.waits.size), default=SHORTEST_US)
    norm = LogNorm(10, max(longest, 100))
    shown = None
    for run, ax in zip(runs, axes, strict=True):
        calm = ~run.waited
        ax.scatter(run.at[calm], run.place[calm], s=1.5, c=QUIET, linewidths=0, rasterized=True)
        order = np.argsort(run.waits)
        shown = ax.scatter(
            run.at[run.waited][order],
            run.place[run.waited][order],
            s=5,
            c=np.maximum(run.waits[order], 10),
            norm=norm,
            cmap="plasma_r",
            linewidths=0,
            rasterized=True,
        )
        ax.set(title=f"{run.name}: {run.waits.size} waits", xlabel="s since the guest ran", xlim=(0, _longest(runs)))
        ax.set_ylim(0, run.memory_mib)
        settled = run.result["settled_us"] / 1e6
        ax.axvline(settled, color="#444", linewidth=0.8, linestyle=":")
        ax.annotate("waits no more", (settled, run.memory_mib), ha="right", va="top", rotation=90, fontsize=7)
    axes[0].set_ylabel("guest memory, MiB")
    if shown is not None:
        figure.colorbar(shown, ax=axes, label="waited", format=FuncFormatter(_time), aspect=40, pad=0.01)
    return figure


def latency(runs: Sequence[Data]) -> Figure:
    """How long waits took: how many, and what share took no longer."""
    figure, (counts, shares) = _new(3.4, 1, 2)
    waits = [np.maximum(run.waits, SHORTEST_US) for run in runs]
    longest = max((some.max() for some in waits if some.size), default=100.0)
    bins = np.geomspace(SHORTEST_US, longest * 1.05, BINS)
    for run, some, colour in zip(runs, waits, _colours(runs), strict=True):
        counts.hist(some, bins=bins.tolist(), color=colour, alpha=0.55, label=run.name)
        ordered = np.sort(some)
        if ordered.size:
            shares.plot(ordered, np.arange(1, ordered.size + 1) / ordered.size, color=colour, label=run.name)
        for part, name in ((0.5, "p50"), (0.99, "p99")):
            if ordered.size:
                _mark(shares, ordered[round(part * (ordered.size - 1))], part, name, colour)
    for ax in (counts, shares):
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(_time))
    counts.set(yscale="log", ylabel="waits", title="how many waits took how long")
    shares.set(ylabel="share", title="share of waits that took no longer", ylim=(0, 1.02))
    shares.yaxis.set_major_formatter(PercentFormatter(1))
    shares.grid(alpha=0.25)
    if len(runs) > 1:
        counts.legend()
    return figure


def _mark(ax: Axes, us: float, share: float, name: str, colour: str) -> None:
    """The first run's to the right of its line, the second's to the left of it."""
    right = colour == COLOURS[0]
    ax.plot(us, share, "o", color=colour, markersize=4)
    ax.annotate(
        f"{name} {_time(float(f'{us:.3g}'))}",
        (us, share),
        xytext=(6, -11) if right else (-6, 4),
        ha="left" if right else "right",
        textcoords="offset points",
        color=colour,
        fontsize=8,
    )


def stages(runs: Sequence[Data]) -> Figure | None:
    """Where the time of a fault goes, on average, one bar a run; None if no run has it."""
    measured = [run for run in runs if run.result.get("stages", {}).get("steps")]
    if not measured:
        return None
    figure, (ax,) = _new(1.3 + 0.5 * len(measured))
    names = list(dict.fromkeys(name for run in measured for name in run.result["stages"]["steps"]))
    for row, run in enumerate(measured):
        begin = 0.0
        whole = sum(step["mean_us"] for step in run.result["stages"]["steps"].values())
        for name, step in run.result["stages"]["steps"].items():
            colour = STEP_COLOURS[names.index(name) % len(STEP_COLOURS)]
            label = f"until {name}" if row == 0 else None
            ax.barh(row, step["mean_us"], left=begin, color=colour, height=0.6, label=label)
            if step["mean_us"] > LABELLED * whole:
                ax.annotate(f"{step['mean_us']:.0f}", (begin + step["mean_us"] / 2, row), ha="center", va="center",
                            fontsize=7, color="white")  # fmt: skip
            begin += step["mean_us"]
    ax.set_yticks(range(len(measured)), [f"{run.name}, {run.result['stages']['faults']} faults" for run in measured])
    ax.invert_yaxis()
    ax.set(xlabel="µs since the touch, mean", title="the way of a faulted page, stage by stage")
    figure.legend(loc="outside lower center", ncols=len(names), fontsize=7)
    return figure


def progress(runs: Sequence[Data]) -> Figure:
    """How much is here, what comes per second, and how often the guest waits, over time."""
    figure, axes = _new(5.0, 3, 1)
    for run, colour in zip(runs, _colours(runs), strict=True):
        times = np.array([time for time, _ in run.looks])
        if times.size > 1:
            received = np.array([told["pages_received"] / told["pages"] for _, told in run.looks])
            axes[0].plot(times, received, color=colour, label=run.name)
            for key, style in (("background_bytes", "-"), ("urgent_bytes", ":")):
                sent = np.array([told["counters"].get(key, 0) for _, told in run.looks]) / MIB
                label = f"{run.name}, {key.removesuffix('_bytes')}"
                axes[1].plot(_middles(times), np.diff(sent) / np.diff(times), style, color=colour, label=label)
        edges = np.linspace(0, max(run.seconds, 1e-6), RATE_BINS)
        each = np.histogram(run.at[run.waited], edges)[0] / np.diff(edges)
        axes[2].stairs(each, edges, color=colour, label=run.name, fill=len(runs) == 1, alpha=0.8)
    axes[0].set(title="guest memory that has arrived", ylim=(0, 1.02))
    axes[0].yaxis.set_major_formatter(PercentFormatter(1))
    axes[1].set(title="throughput, MiB/s")
    axes[2].set(title="waits per second", xlabel="s since the guest ran")
    for ax in axes:
        ax.set_xlim(0, _longest(runs))
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.25)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7, loc="upper right", bbox_to_anchor=(1, 1.15), ncols=4)
    return figure


def vcpus(runs: Sequence[Data]) -> Figure:
    """One line a vCPU thread: when it waited, and for how much of its time."""
    most = max(len(run.threads) for run in runs)
    figure, axes = _new(min(8.0, 1.2 + 0.28 * most), 1, len(runs))
    for run, colour, ax in zip(runs, _colours(runs), axes, strict=True):
        for row, thread in enumerate(run.threads):
            own = run.waited & (run.thread == thread)
            spans = np.column_stack([run.at[own], np.maximum(run.took[own] / 1e6, run.seconds / 4000)])
            ax.broken_barh([(float(a), float(b)) for a, b in spans], (row - 0.4, 0.8), color=colour, rasterized=True)
        labels = [f"{thread}: {run.waited_share(thread):.1%}" for thread in run.threads]
        ax.set_yticks(range(len(labels)), labels, fontsize=8 if most <= 24 else 5)
        ax.set(title=f"{run.name}: thread, and its share of time spent waiting", xlabel="s since the guest ran")
        ax.set_xlim(0, _longest(runs))
        ax.invert_yaxis()
    return figure


def _longest(runs: Sequence[Data]) -> float:
    return max(run.seconds for run in runs) or 1.0


def _middles(times: Numbers) -> Numbers:
    middles: Numbers = (times[1:] + times[:-1]) / 2
    return middles


# Each with what to know of it.
PANELS: dict[str, tuple[Callable[[Sequence[Data]], Figure | None], str]] = {
    "map": (fault_map, "Every access by time and place. Grey ones did not wait; the darker, the longer the wait."),
    "latency": (latency, "How long the guest's threads slept for a page, as they saw it themselves; time logarithmic."),
    "stages": (stages, "The mean way of a faulted page from the touch to the thread running again."),
    "progress": (progress, "What the daemon told while the guest ran, and how often the guest waited."),
    "vcpus": (vcpus, "One line a recorded thread. A mark is a wait, as long as it took."),
}
