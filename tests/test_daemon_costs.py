"""What a daemon costs: nothing while nothing faults, and bitmaps for a guest of any size."""

import os
import time
from pathlib import Path

import pytest
from support.daemon import DaemonProcess
from support.source import COUNT, SourceProcess, memory_file
from support.vmm import PAGE, Vmm

pytest_plugins = ["support.daemon_fixtures"]

TIB = 1 << 40
# What an idle daemon may use of the processor in a second: some timers, and one tick of rounding.
IDLE_CPU_SECONDS = 0.02
BASE_KIB = 60 << 10
BITMAP_KIB = 64 << 10  # of a guest of 1 TiB


def test_an_idle_daemon_uses_no_processor(daemon: DaemonProcess, tmp_path: Path, content: bytes) -> None:
    """Neither without a guest, nor with one that touches nothing and has nothing on its way."""

    def in_a_second() -> float:
        before = daemon.cpu_seconds()
        time.sleep(1.0)
        return daemon.cpu_seconds() - before

    assert in_a_second() <= IDLE_CPU_SECONDS
    options = ("--no-background",)
    with (
        Vmm(len(content)) as vmm,
        SourceProcess(daemon.port, "idle", "--file", tmp_path / "memory", options=options) as source,
    ):
        vmm.hand_off(daemon.socket, "idle").expect("ready")
        assert vmm.read(3) == content[3 * PAGE : 4 * PAGE]
        assert in_a_second() <= IDLE_CPU_SECONDS
        assert vmm.read(0, pages=COUNT) == content
        assert source.result().code == 0
        vmm.expect("done")


def seconds_to_ready(daemon: DaemonProcess, name: str, size: int) -> float:
    """For a sparse guest with three pages, from the hand-off to "ready"; then reads those, and one more."""
    data = {0: b"first", size // PAGE // 2: b"middle", size // PAGE - 1: b"last"}
    fd = memory_file(b"")
    os.truncate(fd, size)
    for page, text in data.items():
        os.pwrite(fd, text.ljust(PAGE, b"."), page * PAGE)
    path = f"/proc/{os.getpid()}/fd/{fd}"
    with Vmm(size) as vmm, SourceProcess(daemon.port, name, "--file", path) as source:
        begin = time.monotonic()
        vmm.hand_off(daemon.socket, name).expect("ready")
        taken = time.monotonic() - begin
        for page, text in data.items():
            assert vmm.read(page) == text.ljust(PAGE, b".")
        assert vmm.read(5) == bytes(PAGE)
        assert vmm.expect("done")["pages"] == size // PAGE
        assert source.result().code == 0
    os.close(fd)
    return taken


@pytest.mark.deadline(120)
def test_the_size_of_a_guest_costs_bitmaps_and_nothing_else(daemon: DaemonProcess) -> None:
    small = seconds_to_ready(daemon, "1G", 1 << 30)
    resting = daemon.memory_kib()
    large = seconds_to_ready(daemon, "1T", TIB)
    peak = daemon.memory_kib()
    assert resting["VmHWM"] <= BASE_KIB
    assert peak["VmHWM"] <= BASE_KIB + BITMAP_KIB
    assert large <= small + 1.0
