"""Guest memory: regions of memory files, and what is known of every page."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self

from gmemd.native._errors import check, checked
from gmemd.native._native import ffi, lib

RUNS_AT_ONCE = 4096  # pairs fetched a call: 64 KiB


class Populate(Enum):
    """How a page gets its content: pwrite, the socket straight into the alias, or a copy into the alias."""

    WRITE = "write"
    RECV = "recv"
    COPY = "copy"


_POPULATE = {
    Populate.WRITE: lib.GM_POPULATE_WRITE,
    Populate.RECV: lib.GM_POPULATE_RECV,
    Populate.COPY: lib.GM_POPULATE_COPY,
}



def native_populate(how: Populate) -> int:
    """The `enum gm_populate` of a way."""
    return _POPULATE[how]


TRAPS = {
    lib.GM_UFFD_MINOR: "minor",
    lib.GM_UFFD_MISSING | lib.GM_UFFD_MINOR: "missing+minor",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """One contiguous piece of guest memory.

    `offset`, `size` and `page_size` in bytes; `gpa` is its guest physical address; `hva` where the VMM has mapped it, 0 at a source.
    `file` and `uffd` count the VMM's descriptors.
    """

    offset: int
    size: int
    page_size: int
    gpa: int
    hva: int = 0
    file: int = 0
    uffd: int = 0

    @property
    def pages(self) -> int:
        return self.size // self.page_size

    @property
    def page_shift(self) -> int:
        return self.page_size.bit_length() - 1


class Memory:
    """All memory of one guest. The descriptors stay the caller's, and must stay open as long as this."""

    def __init__(
        self, migration: str, regions: Sequence[Region], files: Sequence[int], uffds: Sequence[int] = ()
    ) -> None:
        self.regions = tuple(regions)
        specs = ffi.new("struct gm_region_spec[]", len(self.regions))
        for spec, region in zip(specs, self.regions, strict=True):
            spec.fd = files[region.file]
            spec.uffd = uffds[region.uffd] if uffds else -1
            spec.file_name, spec.uffd_name = region.file, region.uffd
            spec.offset, spec.pages = region.offset, region.pages
            spec.gpa, spec.hva, spec.page_shift = region.gpa, region.hva, region.page_shift
        self.native: Any = ffi.gc(
            checked(lib.gm_memory_new, migration.encode(), specs, len(self.regions)), lib.gm_memory_free
        )
        self.pages: int = lib.gm_memory_pages(self.native)
        self.populate: dict[int, Populate] = {}

    @property
    def size(self) -> int:
        """Bytes of guest memory."""
        return sum(region.size for region in self.regions)

    @property
    def received(self) -> int:
        """Pages whose content is in place."""
        return int(lib.gm_memory_received(self.native))

    def set_populate(self, region: int, how: Populate) -> None:
        """Decides how pages of a region get their content; maps the alias where `how` needs one."""
        check(lib.gm_memory_set_populate, self.native, region, native_populate(how))
        self.populate[region] = how

    def register(self) -> str:
        """Registers all regions with their userfaultfds; returns the trap mode, "minor" or "missing+minor"."""
        return TRAPS[check(lib.gm_memory_register, self.native)]

    def unregister(self) -> None:
        """Lets go of all regions: absent pages are zero from then on. Only when nothing is missing."""
        check(lib.gm_memory_unregister, self.native)

    def received_runs(self, region: int) -> Iterator[list[tuple[int, int]]]:
        """The runs (first page, pages) of the received bitmap of a region, some thousands at a time."""
        pairs = ffi.new("uint64_t[]", 2 * RUNS_AT_ONCE)
        at = ffi.new("uint64_t *")
        found = RUNS_AT_ONCE
        while found == RUNS_AT_ONCE:
            found = lib.gm_memory_runs(self.native, region, lib.GM_RECEIVED, at, pairs, RUNS_AT_ONCE)
            if found:
                yield [(pairs[2 * i], pairs[2 * i + 1]) for i in range(found)]

    def close(self) -> None:
        """Unmaps everything. Nothing native may use it any more."""
        ffi.release(self.native)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
