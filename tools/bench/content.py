"""The content of the memory that is moved: a file in memory, no page of it zero, each with its number."""

import mmap
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gmemd_tools.tmpfs import large_folio_file

PAGE = 4096
NUMBER_BYTES = 8
MADV_POPULATE_WRITE = 23  # <linux/mman.h>, Linux 5.14


def warm(size: int) -> None:
    """Has the kernel find so much memory and give it back. In a virtual machine, what nobody has used for a while may
    have to come from its own host first, which takes milliseconds for 2 MiB: neither we nor a peer should meet that."""
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory, suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.madvise(MADV_POPULATE_WRITE)


@contextmanager
def memory_file(size: int, content: int | None = None, *, large_folios: bool = False) -> Iterator[Path]:
    """A file of `size` bytes, all of them content or the first `content`; it is gone afterwards. Page p begins with
    p + 1, which touch.c checks."""
    filled = size if content is None else content
    rest = random.Random(0).randbytes(PAGE - NUMBER_BYTES)
    fd = large_folio_file(size) if large_folios else os.memfd_create("bench-content")
    try:
        os.truncate(fd, size)
        with mmap.mmap(fd, filled) as memory:
            for page in range(filled // PAGE):
                memory[page * PAGE : (page + 1) * PAGE] = (page + 1).to_bytes(NUMBER_BYTES, "little") + rest
        yield Path(f"/proc/{os.getpid()}/fd/{fd}")
    finally:
        os.close(fd)
