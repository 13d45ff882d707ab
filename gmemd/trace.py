"""Trace files: every fault of a migration in a few bytes, readable up to where a crash cut it off. docs/trace.md is the format."""

import logging
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from gmemd.native import lib
from gmemd.native.memory import Region

log = logging.getLogger(__name__)

VERSION = 1
MAGIC = b"GMTRACE\x1a"
HEAD = struct.Struct("<8sII")  # magic, version, bytes of JSON
CRC = struct.Struct("<I")
MARK = b"GMTB"
BLOCK = struct.Struct("<4sI")  # mark, CRC-32C of what follows
COUNTS = struct.Struct("<IIQ")  # bytes of code, faults lost, the tick from which the code counts
CODE_AT = BLOCK.size + COUNTS.size
RECORD = struct.Struct("=QQIHH")  # struct gm_trace_record: time in ns, page, thread, region, flags

MAX_HEADER = 128 * 1024  # of JSON: 1024 regions take a third of it
MAX_BLOCK = CODE_AT + lib.GM_TRACE_CODE_BYTES
READ_BYTES = 16 * MAX_BLOCK
# A block is written when it has so many faults, or waited so long for them: what a crash loses.
BLOCK_FAULTS = 1024
MAX_AGE = 1.0
# Files of a rotating trace: when the oldest goes, three quarters of what may be kept are left.
SEGMENTS = 4


class Fault(NamedTuple):
    """One fault. `time_ns` of the recording host's CLOCK_MONOTONIC; `page` counted from the region's start."""

    time_ns: int
    page: int
    thread: int
    region: int
    write: bool
    minor: bool


@dataclass(frozen=True, slots=True)
class TraceHeader:
    """What a trace is of, and when it began, on both clocks in ns. Of a region, `gpa`, `size` and `page_size` are known."""

    migration: str
    realtime_ns: int
    monotonic_ns: int
    regions: tuple[Region, ...]


class TraceWriter:
    """Writes a migration's faults to the file `path`.

    With `max_bytes`, it is instead a row of files beside it: NAME.0.gmtrace, NAME.1.gmtrace, …, the oldest of them deleted so that
    together they stay within that (if it has room for four headers, each with a block). An earlier row of that name is gone on with.

    Writes are to the disk at once, and raise OSError. What was written before stays readable.
    """

    def __init__(
        self, path: Path, migration: str, regions: Sequence[Region], max_bytes: int | None = None
    ) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._head = encode_header(TraceHeader(migration, time.time_ns(), time.monotonic_ns(), tuple(regions)))
        self._coder = _Coder(regions)
        self._pending = bytearray()
        self._lost = 0
        self._since = 0.0
        self._begin_file()

    def add(self, records: bytes, lost: int = 0) -> None:
        """Adds faults, as `struct gm_trace_record`s, and how many more there were. To be called now and then without any, too.

        Raises ValueError if a fault is outside of all regions.
        """
        if not self._pending and not self._lost:
            self._since = time.monotonic()
        self._pending += records
        self._lost += lost
        while len(self._pending) >= BLOCK_FAULTS * RECORD.size:
            self._write_block()
        if time.monotonic() - self._since >= MAX_AGE:
            self.flush()

    def flush(self) -> None:
        """Writes what waits for its block to be full."""
        while self._pending or self._lost:
            self._write_block()

    def close(self) -> None:
        """Writes what is left."""
        try:
            self.flush()
        finally:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_block(self) -> None:
        block = self._coder.take_block(self._pending, self._lost)
        self._lost = 0
        self._since = time.monotonic()
        if self._max_bytes is not None and self._size + len(block) > self._max_bytes // SEGMENTS:
            self._file.close()
            self._begin_file()
        self._write(block)

    def _begin_file(self) -> None:
        path = self._path if self._max_bytes is None else self._next_segment(self._max_bytes)
        self._file = path.open("wb", buffering=0)
        self._size = 0
        self._write(self._head)

    def _next_segment(self, max_bytes: int) -> Path:
        segments = numbered(self._path)
        room = max_bytes - max(max_bytes // SEGMENTS, len(self._head) + MAX_BLOCK)
        sizes = [path.stat().st_size for path in segments.values()]
        for path, size in zip(segments.values(), sizes.copy(), strict=True):
            if sum(sizes) > room:
                path.unlink()
                sizes.remove(size)
        return self._path.with_suffix(f".{max(segments, default=-1) + 1}{self._path.suffix}")
