"""What `gmemd-replay show` tells of a trace."""

from collections import Counter
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from gmemd.native import lib
from gmemd_tools.replay.recording import Recording

HOT_PAGES = 10
NEAR = 16  # pages: what a readahead would have brought along
BAR = 40  # characters


def summarise(recording: Recording) -> dict[str, Any]:
    """Counts, shares (0 to 1) and times of a recording, by stable names."""
    header = recording.header
    threads = Counter(thread for _, _, thread, _, _ in recording)
    regions = Counter(region for _, _, _, region, _ in recording)
    pages = Counter((region, page) for _, page, _, region, _ in recording)
    span_us = recording.span_ns / 1000
    return {
        "migration": header.migration,
        "began": datetime.fromtimestamp(header.realtime_ns / 1e9, UTC).isoformat(timespec="milliseconds"),
        "faults": len(recording),
        "faults_lost": recording.lost,
        "damaged_bytes": recording.damaged,
        "span_us": span_us,
        "faults_per_s": round(len(recording) / span_us * 1e6, 1) if span_us else 0.0,
        "writes": sum(bool(flags & lib.GM_TRACE_WRITE) for *_, flags in recording),
        "minor": sum(bool(flags & lib.GM_TRACE_MINOR) for *_, flags in recording),
        "pages_touched": len(pages),
        "threads": [{"thread": thread, "faults": count} for thread, count in sorted(threads.items())],
        "regions": [
            {"gpa": region.gpa, "pages": region.pages, "page_size": region.page_size, "faults": regions[index]}
            for index, region in enumerate(header.regions)
        ],
        "hot_pages": [
            {"region": region, "page": page, "faults": count} for (region, page), count in pages.most_common(HOT_PAGES)
        ],
        **_neighbourhood(recording),
        "gaps_us": _gaps(recording),
    }


def _neighbourhood(recording: Recording) -> dict[str, float]:
    """How often a thread's next page is the very next one, or not far."""
    last: dict[tuple[int, int], int] = {}
    following = near = 0
    for _, page, thread, region, _ in recording:
        distance = page - last.get((thread, region), page)
        following += distance == 1
        near += 0 < abs(distance) <= NEAR
        last[thread, region] = page
    return {"sequential": round(following / len(recording), 4), "near": round(near / len(recording), 4)}


def _gaps(recording: Recording) -> list[dict[str, int]]:
    """How many gaps between two faults of one thread are from `from` µs to less than twice that; the first from 0."""
    buckets: Counter[int] = Counter()
    times: dict[int, list[int]] = {}
    for time_ns, _, thread, _, _ in recording:
        times.setdefault(thread, []).append(time_ns)
    for faults in times.values():
        buckets.update(((after - before) // 1000).bit_length() for before, after in pairwise(faults))
    return [{"from": 1 << bucket >> 1, "gaps": buckets[bucket]} for bucket in range(max(buckets, default=-1) + 1)]


def text(summary: dict[str, Any]) -> str:
    """The same for people."""
    lines = [
        f"migration  {summary['migration']}, begun {summary['began']}",
        f"faults     {summary['faults']} in {summary['span_us'] / 1e6:.3f} s, {summary['faults_per_s']:.0f} a second",
        f"           {summary['writes']} to write, {summary['minor']} minor",
        f"not here   {summary['faults_lost']} faults not written, {summary['damaged_bytes']} bytes damaged",
        f"order      {summary['sequential']:.1%} go to the page after the last one, {summary['near']:.1%} near it",
        f"pages      {summary['pages_touched']} touched",
        *(f"           {hot['region']}:{hot['page']} {hot['faults']} times" for hot in summary["hot_pages"][:3]),
        "",
        *(f"thread {thread['thread']:<12} {thread['faults']:>10} faults" for thread in summary["threads"]),
        *(
            f"region {index:<12} {region['faults']:>10} faults in {region['pages']} pages of {region['page_size']}"
            for index, region in enumerate(summary["regions"])
        ),
        "",
        "gaps between faults of a thread",
        *_bars(summary["gaps_us"]),
    ]
    return "\n".join(lines)


def _bars(gaps: list[dict[str, int]]) -> list[str]:
    most = max((gap["gaps"] for gap in gaps), default=0)
    return [f"{gap['from']:>10} µs {gap['gaps']:>9} {'█' * (gap['gaps'] * BAR // most)}" for gap in gaps if gap["gaps"]]
