"""Checks that what a VMM handed over is what it says, before a byte of it is used; and opens memory files for a
source."""

import errno
import fcntl
import os
import socket
from collections.abc import Sequence
from itertools import pairwise

from gmemd.errors import GmemdError, HandoffError, UnavailableError
from gmemd.native import check, ffi, lib
from gmemd.native.memory import Memory, Region

LARGEST_PAGE = 1 << lib.GM_MAX_PAGE_SHIFT
# What a mapping of a guest_memfd fails with when it was made without one of these flags.
MISSING_FLAGS = {errno.ENODEV: "GUEST_MEMFD_FLAG_MMAP", errno.EFAULT: "GUEST_MEMFD_FLAG_INIT_SHARED"}
USERFAULTFD = "anon_inode:[userfaultfd]"


def check_received(regions: Sequence[Region], fds: Sequence[int], limit: int) -> None:
    """Raises HandoffError unless the regions can be received into: empty, apart from each other, behind
    userfaultfds."""
    if (size := sum(region.size for region in regions)) > limit:
        raise HandoffError(f"{size} bytes of guest memory (this daemon takes {limit} at most): sent by the VMM")
    for index, region in enumerate(regions):
        _check_file(index, region, fds[region.file])
        if kind_of(fds[region.file])[0] == lib.GM_FILE:
            raise HandoffError(f"region {index}: not a memory file but one on a disk: sent by the VMM")
        _check_userfaultfd(index, fds[region.uffd])
        empty = lib.gm_memfile_empty(fds[region.file], region.offset, region.size)
        if empty == 0:
            raise HandoffError(
                f"region {index}: its memory file holds data already; it must be untouched: sent by the VMM"
            )
        _check_shared(index, region, fds[region.file])
    files = [(found.st_dev, found.st_ino) for found in map(os.fstat, fds)]
    _check_apart("guest physical addresses", [(0, r.gpa, r.size) for r in regions])
    # Each userfaultfd has an inode of its own: one that came twice is the same address space twice.
    _check_apart("host addresses", [(files.index(files[r.uffd]), r.hva, r.size) for r in regions])
    _check_apart("parts of one memory file", [(files.index(files[r.file]), r.offset, r.size) for r in regions])


def check_faults(fd: int) -> None:
    """Raises HandoffError unless it is a socket of the kind that vCPUs ask on."""
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            right = sock.family is socket.AF_UNIX and sock.type == socket.SOCK_SEQPACKET
    except OSError:
        right = False
    if not right:
        raise HandoffError('"faults" is not a SOCK_SEQPACKET socket: sent by the VMM')


def check_sent(regions: Sequence[Region], fds: Sequence[int]) -> None:
    """Raises HandoffError unless every region lies within its memory file."""
    for index, region in enumerate(regions):
        _check_file(index, region, fds[region.file])


def map_unreadable(memory: Memory, regions: Sequence[Region], fds: Sequence[int]) -> None:
    """Maps the regions of a source whose files have no read(): guest_memfd."""
    for index, region in enumerate(regions):
        if kind_of(fds[region.file])[0] == lib.GM_GUEST_MEMFD:
            check(lib.gm_memory_map, memory.native, index)


def kind_of(fd: int) -> tuple[int, int]:
    """The `enum gm_kind` of a descriptor and its page size in bytes."""
    page_size = ffi.new("uint64_t *")
    kind = check(lib.gm_memfile_kind, fd, page_size)
    return kind, page_size[0]


def _check_file(index: int, region: Region, fd: int) -> None:
    try:
        kind, page_size = kind_of(fd)
    except GmemdError as error:
        raise HandoffError(f"region {index}: {error}: sent by the VMM") from None
    if region.page_size > LARGEST_PAGE:
        raise UnavailableError(f"region {index}: pages of {region.page_size} bytes ({LARGEST_PAGE} at most)")
    if kind != lib.GM_FILE and region.page_size != page_size:
        raise HandoffError(
            f"region {index}: page_size = {region.page_size}, its memory file has pages of {page_size}: sent by the VMM"
        )
    if (size := os.fstat(fd).st_size) < region.offset + region.size:
        needs = region.offset + region.size
        raise HandoffError(f"region {index}: the file has {size} bytes, the region needs {needs}: sent by the VMM")


def _check_shared(index: int, region: Region, fd: int) -> None:
    """A guest_memfd's flags cannot be asked for; whether its pages can be reached can be tried."""
    if kind_of(fd)[0] != lib.GM_GUEST_MEMFD:
        return
    if (error := -lib.gm_memfile_shown(fd, region.offset)) in MISSING_FLAGS:
        raise HandoffError(f"region {index}: a guest_memfd made without {MISSING_FLAGS[error]}: sent by the VMM")
    if error:
        raise HandoffError(f"region {index}: its guest_memfd shows no page: {os.strerror(error)}: sent by the VMM")


def _check_userfaultfd(index: int, fd: int) -> None:
    if (name := os.readlink(f"/proc/self/fd/{fd}")) != USERFAULTFD:
        raise HandoffError(f"region {index}: not a userfaultfd but {name}: sent by the VMM")
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if not flags & os.O_NONBLOCK:
        # A blocking one polls as POLLERR for ever. The flag belongs to the open file, so this is the VMM's, too.
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_NONBLOCK)


def _check_apart(what: str, ranges: Sequence[tuple[int, int, int]]) -> None:
    """Ranges (space, start, size) of one space must not overlap."""
    order = sorted(range(len(ranges)), key=lambda i: ranges[i])
    for a, b in pairwise(order):
        if ranges[a][0] == ranges[b][0] and ranges[a][1] + ranges[a][2] > ranges[b][1]:
            raise HandoffError(f"regions {a} and {b}: their {what} overlap: sent by the VMM")
