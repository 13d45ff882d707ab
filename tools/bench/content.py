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
def memory_file(size: int, content: int | None = None, seed: int = 0) -> Iterator[Path]:
    """A file of `size` bytes, all of them content or the first `content`; it is gone afterwards. Page p begins with
    p + 1, which touch.c checks."""
    filled = size if content is None else content
    rest = random.Random(seed).randbytes(PAGE - NUMBER_BYTES)
    fd = os.memfd_create("bench-content")
    try:
        os.truncate(fd, size)
        with mmap.mmap(fd, filled) as memory:
            for page in range(filled // PAGE):
                memory[page * PAGE : (page + 1) * PAGE] = (page + 1).to_bytes(NUMBER_BYTES, "little") + rest
        yield Path(f"/proc/{os.getpid()}/fd/{fd}")
    finally:
        os.close(fd)
