"""Trace files: every fault of a migration in few bytes, readable up to where a crash cut them off: docs/trace.md."""

import json
import logging
import re
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from gmemd.errors import DataError
from gmemd.migrate.wire import MAX_REGIONS, valid_id
from gmemd.native import crc32c, ffi, lib
from gmemd.native.memory import Region

log = logging.getLogger(__name__)

VERSION = 1
MAGIC = b"GMTRACE\x1a"
HEAD = struct.Struct("<8sII")  # magic, version, bytes of JSON
CRC = struct.Struct("<I")
MARK = b"GMTB"
COUNTS = struct.Struct("<IIQ")  # of a block: bytes of code, faults lost, the tick from which the code counts
CODE_AT = len(MARK) + CRC.size + COUNTS.size
RECORD = struct.Struct("=QQIHH")  # struct gm_trace_record: time in ns, page, thread, region, flags

MAX_HEADER = 128 * 1024  # of JSON: 1024 regions take a third of it
MAX_BLOCK = CODE_AT + lib.GM_TRACE_CODE_BYTES
READ_BYTES = 16 * MAX_BLOCK
PAGE_SIZES = [1 << shift for shift in range(12, 31)]  # as on the wire
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
    """What a trace is of, and when it began, in ns on both clocks. Its regions have `gpa`, `size` and `page_size`."""

    migration: str
    realtime_ns: int
    monotonic_ns: int
    regions: tuple[Region, ...]

    @classmethod
    def now(cls, migration: str, regions: Sequence[Region]) -> Self:
        """The header of a trace that begins."""
        return cls(migration, time.time_ns(), time.monotonic_ns(), tuple(regions))


class TraceWriter:
    """Writes a migration's faults to the file `path`.

    With `max_bytes`, it is instead a row of files beside it: NAME.0.gmtrace, NAME.1.gmtrace, …, the oldest of them
    deleted so that together they stay within that, or within four headers, each with a block. An earlier row of the
    same name is continued.

    Writes go to the file at once, and raise OSError. What was written before stays readable.
    """

    def __init__(self, path: Path, migration: str, regions: Sequence[Region], max_bytes: int | None = None) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._head = encode_header(TraceHeader.now(migration, regions))
        self._segment = max((max_bytes or 0) // SEGMENTS, len(self._head) + MAX_BLOCK)
        self._coder = _Coder(regions)
        self._pending = bytearray()
        self._lost = 0
        self._since = 0.0
        self._begin_file()

    def add(self, records: bytes, lost: int = 0) -> None:
        """Adds faults, as `struct gm_trace_record`s, and how many more there were. Now and then, call it without any.

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
        if self._max_bytes is not None and self._size + len(block) > self._segment:
            self._file.close()
            self._begin_file()
        self._write(block)

    def _begin_file(self) -> None:
        path = self._path if self._max_bytes is None else self._next_segment(self._max_bytes)
        self._file = path.open("wb")
        self._size = 0
        self._write(self._head)

    def _next_segment(self, max_bytes: int) -> Path:
        row = segments(self._path)
        room = max(max_bytes, SEGMENTS * self._segment) - self._segment
        for path in reversed(row.values()):
            room -= path.stat().st_size
            if room < 0:
                path.unlink()
        return self._path.with_suffix(f".{max(row, default=-1) + 1}{self._path.suffix}")

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        self._size += len(data)


def segments(path: Path) -> dict[int, Path]:
    """The files of the rotating trace NAME.gmtrace by their numbers, oldest first."""
    pattern = re.compile(re.escape(path.stem) + r"\.([0-9]+)" + re.escape(path.suffix))
    found = {int(match[1]): file for file in path.parent.iterdir() if (match := pattern.fullmatch(file.name))}
    return dict(sorted(found.items()))


class _Coder:
    """Makes blocks of records."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self._pages = ffi.new("uint64_t[]", [region.pages for region in regions])
        self._code = ffi.new("uint8_t[]", lib.GM_TRACE_CODE_BYTES)
        self._length = ffi.new("uint32_t *")
        self._tick = ffi.new("uint64_t *")

    def take_block(self, pending: bytearray, lost: int) -> bytes:
        """A block of as many records as it takes, which are removed from `pending`; it may be empty."""
        start: int = self._tick[0]
        taken = self._encode(pending)
        del pending[: taken * RECORD.size]
        length: int = self._length[0]
        body = COUNTS.pack(length, lost, start) + bytes(ffi.buffer(self._code, length))
        return MARK + CRC.pack(crc32c(body)) + body

    def _encode(self, pending: bytearray) -> int:
        found = ffi.new("struct gm_problem *")
        with ffi.from_buffer("struct gm_trace_record[]", pending) as records:
            taken: int = lib.gm_trace_encode(
                records, len(records), self._pages, len(self._pages), self._tick, self._code, self._length, found
            )
        if taken < 0:
            raise ValueError(ffi.string(found.text).decode())
        return taken


class TraceReader:
    """Reads a trace file. What is damaged is passed over with a warning; `damaged` counts its bytes, `lost` faults
    never written.

    Raises DataError if the header cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost = 0
        self.damaged = 0
        self._tick = ffi.new("uint64_t *")
        self._records = ffi.new("struct gm_trace_record[]", lib.GM_TRACE_CODE_RECORDS)
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        try:
            self.header = self._read_header()
        except ValueError as error:
            self._file.close()
            raise DataError(f"{path}: {error}") from None
        self._pages = ffi.new("uint64_t[]", [region.pages for region in self.header.regions])

    def __iter__(self) -> Iterator[Fault]:
        for records in self.blocks():
            for time_ns, page, thread, region, flags in RECORD.iter_unpack(records):
                write, minor = bool(flags & lib.GM_TRACE_WRITE), bool(flags & lib.GM_TRACE_MINOR)
                yield Fault(time_ns, page, thread, region, write, minor)

    def blocks(self) -> Iterator[bytes]:
        """The faults as `struct gm_trace_record`s, in their order, some at a time."""
        data = b""
        skipped = 0
        offset = self._file.tell()
        while data := data + self._file.read(READ_BYTES if len(data) < MAX_BLOCK else 0):
            size = block_size_untrusted(data)
            if size and skipped:
                self._skipped(offset - skipped, skipped)
                skipped = 0
            if size:
                yield self._decode_untrusted(offset, data[CODE_AT - COUNTS.size : size])
            else:
                size = to_next_mark(data)
                skipped += size
            offset += size
            data = data[size:]
        if skipped:
            self._skipped(offset - skipped, skipped)

    def must_fit(self, regions: Sequence[Region]) -> None:
        """Raises DataError unless the trace is of a guest with these regions."""
        for index, (ours, theirs) in enumerate(zip(self.header.regions, regions, strict=False)):
            for what in ("gpa", "pages", "page_size"):
                if getattr(ours, what) != getattr(theirs, what):
                    raise DataError(
                        f"{self.path}: region {index}: {what} {getattr(ours, what)} in the trace,"
                        f" {getattr(theirs, what)} in the guest"
                    )
        if len(self.header.regions) != len(regions):
            raise DataError(
                f"{self.path}: {len(self.header.regions)} regions in the trace, {len(regions)} in the guest"
            )

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_header(self) -> TraceHeader:
        head = self._file.read(HEAD.size + CRC.size)
        length = header_length_untrusted(head)
        return header_untrusted(head, self._file.read(length))

    def _decode_untrusted(self, offset: int, body: bytes) -> bytes:
        length, lost, tick = COUNTS.unpack_from(body)
        if tick < self._tick[0]:
            back = (self._tick[0] - tick) * lib.GM_TRACE_TICK_NS // 1000
            log.warning("%s: the block at %d begins %d µs before the last one's end", self.path, offset, back)
        self._tick[0] = max(self._tick[0], tick)
        self.lost += lost
        found = ffi.new("struct gm_problem *")
        count: int = lib.gm_trace_decode_untrusted(
            body[COUNTS.size :], length, self._pages, len(self._pages), self._tick, self._records, found
        )
        if problem := ffi.string(found.text).decode():
            log.warning("%s: the block at %d: %s: only its first %d faults are used", self.path, offset, problem, count)
        return bytes(ffi.buffer(self._records, count * RECORD.size))

    def _skipped(self, offset: int, size: int) -> None:
        self.damaged += size
        log.warning("%s: %d bytes from %d on are damaged or cut off: passed over", self.path, size, offset)


def block_size_untrusted(data: bytes) -> int:
    """The bytes of the block with which `data` begins, 0 if that is none."""
    if len(data) < CODE_AT or not data.startswith(MARK):
        return 0
    (crc,) = CRC.unpack_from(data, len(MARK))
    length, _, _ = COUNTS.unpack_from(data, CODE_AT - COUNTS.size)
    size = CODE_AT + length
    if size > min(len(data), MAX_BLOCK) or crc32c(data[CODE_AT - COUNTS.size : size]) != crc:
        return 0
    return int(size)


def to_next_mark(data: bytes) -> int:
    """The bytes before the next mark in `data`, or before what may be the beginning of one."""
    at = data.find(MARK, 1)
    return at if at > 0 else max(1, len(data) - len(MARK) + 1)


def encode_header(header: TraceHeader) -> bytes:
    """A trace file's first bytes."""
    text = json.dumps(
        {
            "migration": header.migration,
            "realtime_ns": header.realtime_ns,
            "monotonic_ns": header.monotonic_ns,
            "regions": [[region.gpa, region.pages, region.page_size] for region in header.regions],
        }
    ).encode()
    head = HEAD.pack(MAGIC, VERSION, len(text))
    return head + CRC.pack(crc32c(head + text)) + text


def header_length_untrusted(head: bytes) -> int:
    """How many bytes of JSON follow. Raises ValueError."""
    if not head.startswith(MAGIC) or len(head) < HEAD.size + CRC.size:
        raise ValueError(f"not a trace: it begins with {head[: len(MAGIC)]!r}")
    _, version, length = HEAD.unpack_from(head)
    if version != VERSION:
        raise ValueError(f"version {version} of the trace format (this gmemd reads {VERSION})")
    if length > MAX_HEADER:
        raise ValueError(f"its header is damaged: {length} bytes ({MAX_HEADER} at most)")
    return int(length)


def header_untrusted(head: bytes, text: bytes) -> TraceHeader:
    """The header in the two parts of it. Raises ValueError."""
    (crc,) = CRC.unpack_from(head, HEAD.size)
    if crc32c(head[: HEAD.size] + text) != crc:
        raise ValueError("its header is damaged or cut off")
    try:
        values = json.loads(text)
        header = TraceHeader(
            str(values["migration"]),
            _whole_untrusted(values["realtime_ns"]),
            _whole_untrusted(values["monotonic_ns"]),
            tuple(_region_untrusted(*region) for region in values["regions"]),
        )
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"its header makes no sense: {error!r:.200}") from None
    if not valid_id(header.migration) or not 0 < len(header.regions) <= MAX_REGIONS:
        raise ValueError(f"its header makes no sense: {header.migration!r:.80}, {len(header.regions)} regions")
    return header


def _whole_untrusted(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r:.40}: not a whole number")
    return value


def _region_untrusted(*numbers: object) -> Region:
    gpa, pages, page_size = map(_whole_untrusted, numbers)
    if page_size not in PAGE_SIZES or not 0 < pages < (1 << 63) // page_size:
        raise ValueError(f"{pages} pages of {page_size} bytes")
    return Region(offset=0, size=pages * page_size, page_size=page_size, gpa=gpa)
