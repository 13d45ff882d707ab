"""Guest memory: regions of memory files, and what is known of every page."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self

from gmemd.native._errors import check, checked
from gmemd.native._native import ffi, lib

STAMPS = 64 * 1024  # all that the native ring holds
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


_WAYS = {native: way for way, native in _POPULATE.items()}


class Note(Enum):
    """What outlives the daemon, beside the bitmaps."""

    EPOCH = lib.GM_NOTE_EPOCH
    SWITCHED = lib.GM_NOTE_SWITCHED
    RECOVERIES = lib.GM_NOTE_RECOVERIES
    TRAP = lib.GM_NOTE_TRAP
    VCPUS = lib.GM_NOTE_VCPUS
    FAULTS = lib.GM_NOTE_FAULTS


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

    `offset`, `size`, `page_size` and `bitmap_offset` in bytes; `gpa` is its guest physical address; `hva` where the
    VMM has mapped it, 0 at a source.
    `file` and `uffd` count the VMM's descriptors.
    """

    offset: int
    size: int
    page_size: int
    gpa: int
    hva: int = 0
    file: int = 0
    uffd: int = 0
    bitmap: int | None = None
    bitmap_offset: int = 0

    @property
    def pages(self) -> int:
        return self.size // self.page_size

    @property
    def page_shift(self) -> int:
        return self.page_size.bit_length() - 1


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many pages were compared, and how many could not be; `region` and `page` are of the first mismatch."""

    verified: int = 0
    left_out: int = 0
    mismatches: int = 0
    region: int = 0
    page: int = 0

    def __add__(self, later: "Verdict") -> "Verdict":
        first = self if self.mismatches else later
        return Verdict(
            self.verified + later.verified,
            self.left_out + later.left_out,
            self.mismatches + later.mismatches,
            first.region,
            first.page,
        )

    def __str__(self) -> str:
        said = f"{self.verified} pages compared, {self.left_out} left out, {self.mismatches} differ"
        return f"{said}, first page {self.page} of region {self.region}" if self.mismatches else said


class Memory:
    """All memory of one guest. The descriptors stay the caller's, and must stay open as long as this."""

    def __init__(
        self, migration: str, regions: Sequence[Region], files: Sequence[int], uffds: Sequence[int] = ()
    ) -> None:
        specs = ffi.new("struct gm_region_spec[]", len(regions))
        for spec, region in zip(specs, regions, strict=True):
            spec.fd = files[region.file]
            spec.uffd = uffds[region.uffd] if uffds else -1
            spec.file_name, spec.uffd_name = region.file, region.uffd
            spec.bitmap, spec.bitmap_name, spec.bitmap_offset = -1, region.bitmap or 0, region.bitmap_offset
            if region.bitmap is not None:
                spec.bitmap = files[region.bitmap]
            spec.offset, spec.pages = region.offset, region.pages
            spec.gpa, spec.hva, spec.page_shift = region.gpa, region.hva, region.page_shift
        self._own(checked(lib.gm_memory_new, migration.encode(), specs, len(regions)))

    @classmethod
    def adopt(cls, state: int, fds: Sequence[int]) -> Self:
        """Takes over from a daemon that has ended: its state memfd, and the VMM's descriptors in their first order."""
        memory = cls.__new__(cls)
        memory._own(checked(lib.gm_memory_adopt, state, list(fds), len(fds)))
        return memory

    def _own(self, native: Any) -> None:
        self.native: Any = ffi.gc(native, lib.gm_memory_free)
        self.pages: int = lib.gm_memory_pages(native)
        self.populate: dict[int, Populate] = {}
        regions = []
        spec, populate = ffi.new("struct gm_region_spec *"), ffi.new("int *")
        for index in range(lib.gm_memory_regions(native)):
            lib.gm_memory_region(native, index, spec, populate)
            page_size = 1 << spec.page_shift
            regions.append(
                Region(
                    offset=spec.offset,
                    size=spec.pages * page_size,
                    page_size=page_size,
                    gpa=spec.gpa,
                    hva=spec.hva,
                    file=spec.file_name,
                    uffd=spec.uffd_name,
                    bitmap=spec.bitmap_name if spec.bitmap >= 0 else None,
                    bitmap_offset=spec.bitmap_offset,
                )
            )
            if populate[0] in _WAYS:
                self.populate[index] = _WAYS[populate[0]]
        self.regions = tuple(regions)

    def time_stages(self) -> None:
        """From now on the stages of faults are stamped."""
        check(lib.gm_memory_time_stages, self.native)

    def stages(self) -> bytes:
        """The latest stamps as `struct gm_stamp`s, oldest first."""
        stamps = ffi.new("struct gm_stamp[]", STAMPS)
        found = lib.gm_memory_stages(self.native, stamps, STAMPS)
        return bytes(ffi.buffer(stamps, found * ffi.sizeof("struct gm_stamp")))

    @property
    def migration(self) -> str:
        """The migration's name."""
        return bytes(ffi.string(lib.gm_memory_migration(self.native))).decode(errors="replace")

    @property
    def state_fd(self) -> int:
        """The memfd that a successor needs."""
        return int(lib.gm_memory_state_fd(self.native))

    def note(self, note: Note) -> int:
        """A number that outlives the daemon."""
        return int(lib.gm_memory_note(self.native, note.value))

    def set_note(self, note: Note, value: int) -> None:
        lib.gm_memory_set_note(self.native, note.value, value)

    @property
    def trap(self) -> str:
        """How faults are caught, "minor" or "missing+minor"; "" before the registration."""
        return TRAPS.get(self.note(Note.TRAP), "")

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

    def register(self) -> None:
        """Registers all regions with their userfaultfds."""
        check(lib.gm_memory_register, self.native)

    def wake(self) -> None:
        """Makes every thread that waits fault again."""
        check(lib.gm_memory_wake, self.native)

    def unregister(self) -> bool:
        """Lets go of all regions: absent pages are zero from then on. Only when nothing is missing. False while a
        thread of the VMM is on its way back from an event: then once more."""
        return not check(lib.gm_memory_unregister, self.native)

    def keep_digests(self, fd: int = -1) -> None:
        """From now on a digest is kept of every page that is put in place; `fd` has a predecessor's."""
        check(lib.gm_digest_keep, self.native, fd)

    @property
    def digests_fd(self) -> int:
        """The memfd with them that a successor needs, or -1."""
        return int(lib.gm_digest_fd(self.native))

    def digests(self, region: int, first: int, pages: int) -> bytes:
        """Those of what the memory files have now."""
        out = ffi.new("uint32_t[]", pages)
        check(lib.gm_digest_read, self.native, region, first, pages, out)
        return bytes(ffi.buffer(out))

    def compare(self, region: int, first: int, theirs: bytes) -> Verdict:
        """How the digests of a source compare with those that are kept."""
        found = ffi.new("struct gm_verdict *")
        with ffi.from_buffer("uint32_t[]", theirs) as digests:
            lib.gm_digest_compare(self.native, region, first, len(digests), digests, found)
        return Verdict(found.verified, found.left_out, found.mismatches, found.region, found.page)

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
