"""The guest of a replay: its memory at the source, its memory at the destination, and the threads that touch that."""

import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Self

from gmemd.errors import DataError, UnavailableError
from gmemd.native import check, checked, ffi, lib
from gmemd.native.memory import Region
from gmemd.trace import RECORD
from gmemd_tools import room

BASE_PAGE = 4096
UFFD_FEATURE_THREAD_ID = 1 << 8
TOUCH = struct.Struct("=QQQ")  # struct gm_touch


@dataclass(frozen=True, slots=True)
class Played:
    """What became of one recorded thread's accesses, here done by the thread `tid`."""

    thread: int
    tid: int
    touches: list[tuple[int, int, int]]  # when it began and how long it took, in ns, and 1 if it waited


class Guest:
    """Memory with these regions, its content decided by `seed`, at both ends. One memory file for each page size."""

    def __init__(self, regions: Sequence[Region], seed: int) -> None:
        sizes = sorted({region.page_size for region in regions})
        ends = dict.fromkeys(sizes, 0)
        placed = []
        for region in regions:
            placed.append(replace(region, offset=ends[region.page_size], file=sizes.index(region.page_size)))
            ends[region.page_size] += region.size
        room.check(size := sum(ends.values()), f"the trace's guest has {size} bytes")
        self._ready = threading.Event()
        self._start_ns = 0
        with ExitStack() as self._owned:
            self.sent = [self._new_file(size, page_size) for page_size, size in ends.items()]
            self.received = [self._new_file(size, page_size) for page_size, size in ends.items()]
            self.uffd = self._own(check(lib.gm_uffd_open, UFFD_FEATURE_THREAD_ID))
            addresses = [self._map(fd) for fd in self.received]
            self.regions = [
                replace(region, hva=addresses[region.file] + region.offset, uffd=len(sizes)) for region in placed
            ]
            specs = ffi.new("struct gm_player_region[]", [(r.hva, r.pages, r.page_shift) for r in self.regions])
            self._player = ffi.gc(checked(lib.gm_player_new, specs, len(specs), seed), lib.gm_player_free)
            self._owned = self._owned.pop_all()

    def fill(self) -> None:
        """Gives the source its memory."""
        addresses = [self._map(fd) for fd in self.sent]
        for index, region in enumerate(self.regions):
            lib.gm_player_fill(self._player, index, addresses[region.file] + region.offset)

    def play(self, thread: int, accesses: bytearray, origin_ns: int, pace: float) -> Played:
        """Touches in the calling thread what a recorded one did, from `ready` on. Raises DataError for a wrong page."""
        count = len(accesses) // RECORD.size
        touches = ffi.new("struct gm_touch[]", count)
        self._ready.wait()
        with ffi.from_buffer("struct gm_trace_record[]", accesses) as records:
            done = self._checked(lib.gm_player_run, records, count, origin_ns, self._start_ns, pace, touches)
        told = ffi.buffer(touches, done * TOUCH.size)
        return Played(thread, threading.get_native_id(), list(TOUCH.iter_unpack(told)))

    def ready(self) -> None:
        """The threads may touch the memory."""
        self._start_ns = time.monotonic_ns()
        self._ready.set()

    def stop(self) -> None:
        """Ends the threads, also those that wait for a page: what they then see is not looked at."""
        lib.gm_player_stop(self._player)
        for region in self.regions:
            lib.gm_uffd_unregister(self.uffd, region.hva, region.size)
        self._ready.set()

    def verify(self) -> int:
        """Compares all memory, after everything was played; returns how many pages. DataError if one is wrong."""
        for index in range(len(self.regions)):
            self._checked(lib.gm_player_check, index)
        return sum(region.pages for region in self.regions)

    def close(self) -> None:
        """Frees all; no thread may play any more."""
        ffi.release(self._player)
        self._owned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _own(self, fd: int) -> int:
        self._owned.callback(os.close, fd)
        return fd

    def _new_file(self, size: int, page_size: int) -> int:
        huge_page = page_size if page_size > BASE_PAGE else 0
        return self._own(check(lib.gm_memfile_memfd, b"gmemd-replay", size, huge_page))

    def _map(self, fd: int) -> int:
        try:
            mapping = self._owned.enter_context(mmap.mmap(fd, os.fstat(fd).st_size))
        except OSError as error:
            raise UnavailableError(f"memory like the trace's cannot be mapped: {error.strerror}") from None
        return int(ffi.cast("uintptr_t", ffi.from_buffer(mapping)))

    def _checked(self, call: Callable[..., int], *args: object) -> int:
        found = ffi.new("struct gm_problem *")
        if (done := call(self._player, *args, found)) < 0:
            raise DataError(f"wrong memory: {ffi.string(found.text).decode()}")
        return done
