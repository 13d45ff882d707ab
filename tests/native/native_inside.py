"""Functions of the C helper that Python is not given, called in the very library that Python uses.

Their declarations are taken out of the headers, so that they cannot differ from what was compiled.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cffi import FFI

from gmemd.native import _native
from gmemd.native.destination import Destination

HEADERS = Path(__file__).parents[2] / "gmemd/native"
NAMES = {
    "bitmap.h": [
        "gm_bitmap_test",
        "gm_bitmap_claim",
        "gm_bitmap_give_back",
        "gm_bitmap_set",
        "gm_bitmap_find",
        "gm_bitmap_count",
        "gm_mask_run",
    ],
    "waits.h": ["struct gm_wait"],
    "blocked.h": [
        "struct gm_blocked_thread",
        "gm_blocked_init",
        "gm_blocked_deinit",
        "gm_blocked_add",
        "gm_blocked_list",
    ],
    "giveway.h": ["struct gm_giveway", "gm_giveway_queue", "gm_giveway_wait", "gm_giveway_rate"],
    "histogram.h": ["gm_histogram_record"],
    "guard.h": ["gm_guarded_store", "gm_guarded_load"],
    "memory.h": ["gm_memory_find"],
    "memfile.h": ["gm_memfile_zero"],
    "install.h": [
        "struct gm_install",
        "gm_install_events_begin",
        "gm_install_events_end",
        "gm_install_begin",
        "gm_install_populate",
        "gm_install_finish",
        "gm_install_give_up",
        "gm_install_removed",
    ],
}


def declaration(header: str, name: str) -> str:
    text = (HEADERS / header).read_text()
    pattern = rf"^{name} \{{.*?^\}};" if name.startswith("struct") else rf"^\w[^;(]*\b{name}\([^;]*;"
    found = re.search(pattern, text, re.MULTILINE | re.DOTALL)
    assert found, f"{header} does not declare {name}"
    return found[0].replace("_Atomic ", "") + "\n"


def declarations() -> str:
    # An atomic word has the size and the alignment of a plain one.
    known = "typedef uint64_t gm_word;\n" + declaration("problem.h", "struct gm_problem")
    return known + "".join(declaration(header, name) for header, names in NAMES.items() for name in names)


ffi = FFI()
ffi.cdef(declarations())
inside: Any = ffi.dlopen(_native.__file__)


def pointer(kind: str, native: Any) -> Any:
    """The same pointer for these functions that `gmemd.native` has: cffi keeps the types of two modules apart."""
    return ffi.cast(kind, address(native))


def address(native: Any) -> int:
    return int(_native.ffi.cast("uintptr_t", native))


def _native_of(destination: Destination) -> Any:
    return pointer("struct gm_destination *", destination.native)


def _region_of(destination: Destination) -> Any:
    memory = pointer("struct gm_memory *", destination.memory.native)
    return inside.gm_memory_find(memory, destination.memory.regions[0].hva)


@contextmanager
def reading_events(destination: Destination) -> Iterator[Callable[[int, int], None]]:
    """The pager has read events and acts upon them. What this gives notes a removal: first page, pages; they are not
    yet punched out."""
    native, region = _native_of(destination), _region_of(destination)
    inside.gm_install_events_begin(native)
    try:
        yield lambda first, count: inside.gm_install_removed(native, region, first, count)
    finally:
        inside.gm_install_events_end(native)


def removal_read(destination: Destination, first: int, count: int) -> None:
    with reading_events(destination) as removed:
        removed(first, count)


class Install:
    """One frame on its way into guest memory, step by step, so that a test decides what happens between two steps."""

    def __init__(self, destination: Destination, lane: int, first: int, count: int) -> None:
        self._in: Any = ffi.new("struct gm_install *")
        self._problem = ffi.new("struct gm_problem *")
        where = (_native_of(destination), lane, _region_of(destination), first, count)
        assert inside.gm_install_begin(self._in, *where, self._problem) == 0

    @property
    def claimed(self) -> set[int]:
        """The pages that are ours to install."""
        mask, first = int(self._in.claimed), int(self._in.first)
        return {first + bit for bit in range(64) if mask >> bit & 1}

    def populate(self, data: bytes | None) -> bool:
        """Whether it worked; None stands for zeros."""
        return bool(inside.gm_install_populate(self._in, ffi.NULL if data is None else data, self._problem) == 0)

    def finish(self) -> None:
        inside.gm_install_finish(self._in)

    def give_up(self) -> bool:
        """Whether the VMM took something of it out."""
        return bool(inside.gm_install_give_up(self._in))
