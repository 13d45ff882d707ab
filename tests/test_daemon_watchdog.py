"""The service manager hears of us as long as faults are answered, and no longer."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.daemon import DaemonProcess
from support.polling import eventually
from support.vmm import PAGE, Vmm

from gmemd.daemon import PAGER_THREAD

PTRACE_ATTACH, PTRACE_DETACH = 16, 17
WALL = 0x40000000  # __WALL: a thread is waited for, too
INTERVAL = 0.4

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DaemonProcess]:
    monkeypatch.setenv("WATCHDOG_USEC", str(int(INTERVAL * 1e6)))
    with DaemonProcess(tmp_path) as daemon:
        yield daemon
        assert daemon.stop() == 0


def pings(daemon: DaemonProcess) -> int:
    return daemon.manager.told.count("WATCHDOG=1")


def thread_of(daemon: DaemonProcess, name: str) -> int:
    tasks = Path(f"/proc/{daemon.process.pid}/task")
    (task,) = [int(task.name) for task in tasks.iterdir() if (task / "comm").read_text().strip() == name]
    return task


@contextmanager
def stopped(thread: int) -> Iterator[None]:
    """One thread of another process stands still, the others go on."""
    if libc.ptrace(PTRACE_ATTACH, thread, None, None):
        pytest.skip(f"ptrace: {os.strerror(ctypes.get_errno())}")
    os.waitpid(thread, WALL)
    try:
        yield
    finally:
        libc.ptrace(PTRACE_DETACH, thread, None, None)


def test_a_pager_that_stands_still_stops_the_pings(daemon: DaemonProcess) -> None:
    """Though the event loop goes on, and says so. When the pager moves again, so do the pings."""
    eventually(lambda: pings(daemon) >= 3)
    with stopped(thread_of(daemon, PAGER_THREAD)):
        eventually(lambda: "the pager has not moved" in daemon.log.read_text())
        before = pings(daemon)
        told = daemon.log.read_text().count("the pager has not moved")
        eventually(lambda: daemon.log.read_text().count("the pager has not moved") >= told + 2)
        assert daemon.status()["migrations"] == []
        assert pings(daemon) == before
    eventually(lambda: pings(daemon) > before)


def test_pings_go_on_while_a_guest_waits_for_its_source(daemon: DaemonProcess) -> None:
    with Vmm(PAGE) as vmm:
        vmm.hand_off(daemon.socket, "waits")
        before = pings(daemon)
        eventually(lambda: pings(daemon) >= before + 3)
