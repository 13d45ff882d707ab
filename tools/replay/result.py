"""What a replay showed, in figures."""

from typing import Any

from gmemd_tools.replay.guest import Played
from gmemd_tools.replay.recording import Recording

PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}


def result(recording: Recording, played: list[Played], daemon: dict[str, Any], verified: int) -> dict[str, Any]:
    """The object of `gmemd-replay run --json`. A touch that had to wait is a fault; `daemon` is the daemon's status."""
    touches = [touch for thread in played for touch in thread.touches]
    waits = [took for _, took, waited in touches if waited]
    began = min(began for began, _, _ in touches)
    ended = max(began + took for began, took, _ in touches)
    duration_us = (ended - began) / 1000
    return {
        "ok": verified == daemon["pages"],
        "trap": daemon["trap"],
        "populate": "+".join(daemon["populate"]),
        "pages": daemon["pages"],
        "pages_verified": verified,
        "mismatches": 0,  # the first one ends a replay
        "touches": len(touches),
        "faults": len(waits),
        "faults_per_s": round(len(waits) / duration_us * 1e6, 1),
        "fault_latency_us": latency_us(waits),
        "touch_latency_us": latency_us([took for _, took, _ in touches]),
        "duration_us": duration_us,
        "recorded_us": recording.span_ns / 1000,
        "settled_us": _settled_us(played, began),
        "threads": [_thread(thread) for thread in sorted(played, key=lambda thread: thread.thread)],
        "daemon": {
            "fault_latency_us": daemon["fault_latency_us"],
            "counters": daemon["counters"],
            "recoveries": daemon["recoveries"],
        },
    }


def _settled_us(played: list[Played], began: int) -> float:
    """From the first access until no thread waited any more."""
    ends = [start + took for thread in played for start, took, waited in thread.touches if waited]
    return (max(ends) - began) / 1000 if ends else 0.0


def _thread(played: Played) -> dict[str, Any]:
    waits = [took for _, took, waited in played.touches if waited]
    return {
        "thread": played.thread,
        "tid": played.tid,
        "touches": len(played.touches),
        "faults": len(waits),
        "waited_us": sum(waits) / 1000,
    }


def latency_us(times_ns: list[int]) -> dict[str, float]:
    """Percentiles, maximum and mean in µs, each a time that was measured; all 0 if there is none."""
    if not times_ns:
        return dict.fromkeys([*PERCENTILES, "max", "mean"], 0.0)
    ordered = sorted(times_ns)
    last = len(ordered) - 1
    found = {name: ordered[round(part * last)] / 1000 for name, part in PERCENTILES.items()}
    return found | {"max": ordered[-1] / 1000, "mean": round(sum(ordered) / len(ordered) / 1000, 3)}


def text(result: dict[str, Any]) -> str:
    """The same for people."""
    counters = result["daemon"]["counters"]
    lines = [
        f"{result['pages_verified']} of {result['pages']} pages right, {result['trap']}, {result['populate']}",
        f"{result['touches']} touches by {len(result['threads'])} threads in {result['duration_us'] / 1e6:.3f} s",
        f"{result['faults']} of them had to wait, {result['faults_per_s']:.0f} a second",
        f"{counters['urgent_pages']} pages came urgently, {counters['background_pages']} otherwise",
        f"no thread waited any more after {result['settled_us'] / 1e6:.3f} s",
        "",
        f"{'µs':<28}" + "".join(f"{name:>10}" for name in result["touch_latency_us"]),
    ]
    for name, values in (
        ("waits, as the thread saw them", result["fault_latency_us"]),
        ("the same inside the daemon", result["daemon"]["fault_latency_us"]),
        ("all touches", result["touch_latency_us"]),
    ):
        lines.append(f"{name:<28}" + "".join(f"{values[key]:>10.1f}" for key in result["touch_latency_us"]))
    return "\n".join(lines)
