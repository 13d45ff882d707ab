"""The content of the memory that is moved: a file in memory, no page of it zero, each with its number."""

import mmap
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PAGE = 4096
NUMBER_BYTES = 8


@contextmanager
def memory_file(size: int, seed: int = 0) -> Iterator[Path]:
    """A file with `size` bytes of content; it is gone afterwards. Page p begins with p + 1, which touch.c checks."""
    rest = random.Random(seed).randbytes(PAGE - NUMBER_BYTES)
    fd = os.memfd_create("bench-content")
    try:
        os.truncate(fd, size)
        with mmap.mmap(fd, size) as memory:
            for page in range(size // PAGE):
                memory[page * PAGE : (page + 1) * PAGE] = (page + 1).to_bytes(NUMBER_BYTES, "little") + rest
        yield Path(f"/proc/{os.getpid()}/fd/{fd}")
    finally:
        os.close(fd)
