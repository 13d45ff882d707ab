"""Makes one trace of several of the same image: every page once, as early as any of them had it."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from gmemd.errors import DataError
from gmemd.trace import RECORD, TraceHeader, TraceReader, TraceWriter
from gmemd_tools.replay.recording import Recording, load

Touch = tuple[int, int, int, int]  # ns since its trace's first fault, page, thread, flags


def merge(paths: Sequence[Path], output: Path) -> int:
    """Writes `output`, which may be one of `paths`. Returns how many pages it has. DataError if the traces are not of
    the same regions. Files of one rotating trace stand together, the oldest first."""
    recordings = [load(list(row)) for _, row in groupby(paths, _recorded)]
    first: dict[tuple[int, int], Touch] = {}
    for recording in recordings:
        if recording.header.regions != recordings[0].header.regions:
            raise DataError(f"{', '.join(map(str, paths))}: not traces of the same regions")
        _take(recording, first)
    ordered = sorted((*touch, region) for (region, _), touch in first.items())
    records = b"".join(RECORD.pack(time, page, thread, region, flags) for time, page, thread, flags, region in ordered)
    part = output.with_name(f".{output.name}.part")
    try:
        with TraceWriter(part, recordings[0].header.migration, recordings[0].header.regions) as writer:
            writer.add(records)
        part.replace(output)
    except OSError as error:
        raise DataError(f"{output}: {error.strerror}") from None
    return len(first)


def _recorded(path: Path) -> TraceHeader:
    with TraceReader(path) as reader:
        return reader.header


def _take(recording: Recording, first: dict[tuple[int, int], Touch]) -> None:
    origin = recording.origin_ns
    for time_ns, page, thread, region, flags in recording:
        touch = (time_ns - origin, page, thread, flags)
        first[region, page] = min(touch, first.get((region, page), touch))
