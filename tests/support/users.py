"""What another user of this host does. A thread takes that user's identity; the rest of the process keeps its own."""

import ctypes
import os
import platform
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")
# setresuid, setresgid, setgroups: glibc's functions change every thread.
NUMBERS = {"x86_64": (117, 119, 116), "aarch64": (147, 149, 159)}
ALICE, BOB = 61001, 61002  # who need no entry anywhere

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")


def become(uid: int) -> None:
    """Of this thread only, and of no group of ours."""
    setresuid, setresgid, setgroups = NUMBERS[platform.machine()]
    syscall = ctypes.CDLL(None).syscall
    assert syscall(setgroups, 0, None) == syscall(setresgid, -1, uid, -1) == syscall(setresuid, -1, uid, -1) == 0


def as_user(uid: int, work: Callable[[], T]) -> T:
    """What `work` returns, or raises, in a thread of that user."""
    results: list[T] = []
    problems: list[BaseException] = []

    def run() -> None:
        try:
            become(uid)
            results.append(work())
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if problems:
        raise problems[0]
    return results[0]


def connect_as(uid: int, sock: socket.socket, path: Path) -> None:
    as_user(uid, lambda: sock.connect(str(path)))


@contextmanager
def open_folder() -> Iterator[Path]:
    """One that every user can go into, unlike those of pytest."""
    path = Path(tempfile.mkdtemp(prefix="gmemd-test-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)
