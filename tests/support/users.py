"""What another user of this host does. A thread takes that user's identity; the rest of the process keeps its own."""

import ctypes
import os
import platform
import shutil
import socket
import sys
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


# Shows $1 … below a folder that others may not enter, in a mount namespace of its own.
OPEN_UP = """
set -e
closed=$1 kept=$(mktemp -d); shift
for path; do
    shift
    [ "$path" != -- ] || break
    mkdir -p "$kept$path" && mount --bind "$path" "$kept$path"
    paths="$paths $path"
done
mount -t tmpfs -o mode=755 none "$closed"
for path in $paths; do mkdir -p "$path" && mount --bind "$kept$path" "$path"; done
exec "$@"
"""


def runs_for_anybody() -> tuple[str, ...]:
    """A prefix with which every user reaches the interpreter and this tree, where they lie in a folder of root."""
    wanted = [Path(sys.base_prefix), Path(sys.prefix), Path(__file__).parents[2]]
    closed = {folder for path in wanted for folder in path.parents if not folder.stat().st_mode & 0o001}
    if not closed:
        return ()
    (top,) = [folder for folder in closed if not closed & set(folder.parents)]
    inside = [str(path) for path in wanted if top in path.parents]
    return ("unshare", "--mount", "sh", "-c", OPEN_UP, "sh", str(top), *inside, "--")
