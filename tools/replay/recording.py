"""A recording: what one trace or several files of one rotating trace hold, in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gmemd.errors import DataError
from gmemd.trace import RECORD, TraceHeader, TraceReader


@dataclass(slots=True)
class Recording:
    """Faults as `struct gm_trace_record`s, in the order of their times.

    `lost` more were never written, and `damaged` bytes could not be read.
    """

    header: TraceHeader
    records: bytearray = field(default_factory=bytearray)
    lost: int = 0
    damaged: int = 0

    def __len__(self) -> int:
        return len(self.records) // RECORD.size

    def __iter__(self) -> Iterator[tuple[int, int, int, int, int]]:
        """Time in ns, page, thread, region, flags."""
        return RECORD.iter_unpack(self.records)

    @property
    def span_ns(self) -> int:
        """From the first fault to the last."""
        return self._time(-1) - self._time(0) if self.records else 0

    @property
    def origin_ns(self) -> int:
        """When the first fault was."""
        return self._time(0)

    def threads(self) -> dict[int, bytearray]:
        """The records of each thread."""
        found: dict[int, bytearray] = {}
        for at, record in zip(range(0, len(self.records), RECORD.size), self, strict=True):
            found.setdefault(record[2], bytearray()).extend(self.records[at : at + RECORD.size])
        return found

    def _time(self, index: int) -> int:
        time_ns: int = RECORD.unpack_from(self.records, index % len(self) * RECORD.size)[0]
        return time_ns


def load(paths: Sequence[Path]) -> Recording:
    """Reads the files, in that order. Raises DataError if they do not belong together, or hold no fault."""
    recording: Recording | None = None
    for path in paths:
        with TraceReader(path) as reader:
            recording = recording or Recording(reader.header)
            reader.must_fit(recording.header.regions)
            start = len(recording)
            for records in reader.blocks():
                recording.records += records
            recording.lost += reader.lost
            recording.damaged += reader.damaged
            if 0 < start < len(recording) and recording._time(start) < recording._time(start - 1):
                raise DataError(f"{path}: begins before the end of the file named before it")
    if not recording:
        raise DataError(f"{', '.join(map(str, paths))}: no faults in it")
    return recording
