"""A run as a file: what `gmemd-replay run -o` keeps, and `report` draws. docs/replay.md gives the format."""

import gzip
import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gmemd.errors import DataError
from gmemd.trace import RECORD
from gmemd_tools.replay.guest import Played
from gmemd_tools.replay.recording import Recording

VERSION = 1
TOUCH = struct.Struct("<QQQIHH")  # began and took, in ns; page, thread, region, flags
WAITED, WRITE = 1, 2
MAX_TEXT = 64 << 20
Look = tuple[int, dict[str, Any]]


class Touch(NamedTuple):
    """One access: when it began, since the first of the run; whether the thread had to wait for the page."""

    began_ns: int
    took_ns: int
    page: int
    thread: int
    region: int
    waited: bool
    write: bool


@dataclass(frozen=True, slots=True)
class Run:
    """What one run showed. `looks`: what the daemon told meanwhile of the migration, with ns since the first access."""

    name: str
    result: dict[str, Any]
    regions: list[tuple[int, int, int]]  # guest physical address, pages, page size
    touches: list[Touch]
    looks: list[Look]


def write(
    path: Path, result: dict[str, Any], recording: Recording, played: Sequence[Played], looks: Sequence[Look]
) -> None:
    """Raises DataError if it cannot."""
    begin = min(thread.touches[0][0] for thread in played if thread.touches)
    head = {
        "gmemd-replay": VERSION,
        "result": result,
        "regions": [(region.gpa, region.pages, region.page_size) for region in recording.header.regions],
        "looks": [(time - begin, told) for time, told in looks],
    }
    try:
        with gzip.open(path, "wb", compresslevel=3) as file:
            file.write(json.dumps(head).encode() + b"\n")
            file.write(b"".join(_touches(recording, played, begin)))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _touches(recording: Recording, played: Sequence[Played], begin: int) -> Iterator[bytes]:
    threads = recording.threads()
    for thread in played:
        asked = RECORD.iter_unpack(threads[thread.thread])  # in the order of what became of it
        for (_, page, number, region, flags), (began, took, waited) in zip(asked, thread.touches, strict=False):
            yield TOUCH.pack(began - begin, took, page, number, region, bool(waited) * WAITED + (flags & 1) * WRITE)


def read(path: Path) -> Run:
    """Raises DataError for a file that is none, of another version, or cut off."""
    try:
        with gzip.open(path, "rb") as file:
            line = file.readline(MAX_TEXT)
            data = file.read()
        head = json.loads(line)
        if head["gmemd-replay"] != VERSION:
            raise DataError(f"{path}: version {head['gmemd-replay']} of a run (this gmemd reads {VERSION})")
        touches = [
            Touch(began, took, page, thread, region, bool(flags & WAITED), bool(flags & WRITE))
            for began, took, page, thread, region, flags in TOUCH.iter_unpack(data)
        ]
        regions = [(gpa, pages, page_size) for gpa, pages, page_size in head["regions"]]
        looks = [(time, told) for time, told in head["looks"]]
        return Run(path.name.removesuffix(".gmrun"), head["result"], regions, sorted(touches), looks)
    except (gzip.BadGzipFile, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path}: not a run that gmemd-replay has kept: {error!r:.100}") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except (EOFError, zlib.error, struct.error):
        raise DataError(f"{path}: cut off or damaged") from None
