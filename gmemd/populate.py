"""Chooses how pages get their content: what works on a memory file, and of that what is fastest here, by trying."""

import logging
import os

from gmemd.errors import GmemdError, HandoffError
from gmemd.guestmemory import kind_of
from gmemd.native import check, lib
from gmemd.native.memory import Populate, native_populate

log = logging.getLogger(__name__)

# Enough to be told apart, done in some milliseconds, and too short to be disturbed each time.
MEASURED_BYTES = 2 << 20
ROUNDS = 12
# A busy host makes figures jump. What claims pages for a shorter time has to be beaten clearly.
HANDICAP = {Populate.WRITE: 1.0, Populate.COPY: 1.2, Populate.RECV: 1.4}
GUEST_MEMFD_FLAGS = lib.GM_GUEST_MEMFD_MMAP | lib.GM_GUEST_MEMFD_INIT_SHARED
HUGE_PAGE = 2 << 20


class Chooser:
    """Remembers what was measured for each kind of memory file. `wanted` is "auto", or the one way to use."""

    def __init__(self, wanted: str = "auto") -> None:
        self.wanted = None if wanted == "auto" else Populate(wanted)
        self._order: dict[int, list[Populate]] = {}

    def choose(self, fd: int) -> Populate:
        """The way for this memory file; HandoffError if the wanted one does not work on it."""
        possible = ways(fd)
        if self.wanted is not None:
            if self.wanted not in possible:
                raise HandoffError(f'populate = "{self.wanted.value}" does not work on this memory file')
            return self.wanted
        kind, _ = kind_of(fd)
        if kind == lib.GM_GUEST_MEMFD and Populate.WRITE in possible:
            # It takes no write() unless its VMM asked for that, for what it saves: the mapping and its faults.
            return Populate.WRITE
        if kind not in self._order:
            self._order[kind] = measured(kind)
        return next((way for way in self._order[kind] if way in possible), possible[0])


def ways(fd: int) -> list[Populate]:
    """What works on this memory file, without changing it: a write of nothing tells whether it takes any."""
    try:
        os.pwrite(fd, b"", 0)
    except OSError:
        return [Populate.COPY, Populate.RECV]
    return [Populate.WRITE, Populate.COPY, Populate.RECV]


def measured(kind: int) -> list[Populate]:
    """The ways that work on a new memory file of this kind, fastest first; none if no such file can be made."""
    times: dict[Populate, list[int]] = {}
    for _ in range(ROUNDS):
        for way in Populate:
            try:
                times.setdefault(way, []).append(_measure(kind, way))
            except GmemdError as error:
                log.debug("%s: %s", way.value, error)
    order = sorted((way for way in times if times[way]), key=lambda way: min(times[way]) * HANDICAP[way])
    log.info("populate: %s", ", ".join(f"{way.value} {min(times[way]) / 1e6:.1f} ms" for way in order))
    return order


def _measure(kind: int, way: Populate) -> int:
    fd = _new_file(kind)
    try:
        return check(lib.gm_measure_populate, fd, native_populate(way), MEASURED_BYTES)
    finally:
        os.close(fd)


def _new_file(kind: int) -> int:
    if kind == lib.GM_GUEST_MEMFD:
        return check(lib.gm_memfile_guest_memfd, MEASURED_BYTES, GUEST_MEMFD_FLAGS)
    return check(lib.gm_memfile_memfd, b"gmemd-measure", MEASURED_BYTES, HUGE_PAGE if kind == lib.GM_HUGETLB else 0)
