"""Memory files that cannot be changed for a while."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def read_only(fd: int) -> Iterator[None]:
    """Nothing can be punched out of the file meanwhile, and nothing be written to it."""
    before = os.dup(fd)
    only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(only, fd, inheritable=False)
    os.close(only)
    try:
        yield
    finally:
        os.dup2(before, fd, inheritable=False)
        os.close(before)
