"""guest_memfd at length, with real vCPUs: every way to fill it, out of the direct map, and with daemons that die."""

import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import trio
from cffi import FFI
from support.guest_memfd import moved, need, need_files, run_demo

from gmemd import probe, status
from gmemd_tools.demo.cast import Cast
from gmemd_tools.demo.options import usual
from gmemd_tools.demo.plan import MIGRATION, Plan
from gmemd_tools.demo.processes import open_stage

PAGE = 4096
MEMORY = 16 << 20
ffi = FFI()
ffi.cdef("""
struct iovec { void *iov_base; size_t iov_len; };
ssize_t process_vm_readv(int, const struct iovec *, unsigned long, const struct iovec *, unsigned long, unsigned long);
""")
libc: Any = ffi.dlopen(None)
MAPPED = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw-s .*kvm-gmem", re.MULTILINE)


@pytest.mark.lab
@pytest.mark.parametrize("way", ["recv", "copy"])
def test_it_is_filled_without_write(way: str) -> None:
    need("guest_memfd")
    assert moved(f"--populate={way}")["populate"] == way


@pytest.mark.lab
def test_it_is_out_of_the_direct_map() -> None:
    need("guest_memfd_no_direct_map")
    said = moved("--slot=guest_memfd", "--no-direct-map")
    assert said["populate"] == "write"
    assert said["vcpu_exits"] > 0


@pytest.mark.lab
@pytest.mark.parametrize("way", ["recv", "copy"])
def test_it_is_out_of_the_direct_map_and_filled_without_write(way: str) -> None:
    need("guest_memfd_no_direct_map")
    assert moved("--slot=guest_memfd", "--no-direct-map", f"--populate={way}")["populate"] == way


@pytest.mark.lab
def test_several_slots_lie_in_one_file() -> None:
    need("guest_memfd_userfault")
    assert moved("--slot=guest_memfd", "--regions=5", "--prefault")["vcpu_exits"] > 0


@pytest.mark.lab
@pytest.mark.parametrize("more", [[], ["--no-direct-map"]], ids=["", "no-direct-map"])
def test_the_daemon_is_killed_while_vcpus_wait_for_it(more: list[str]) -> None:
    """Its successor has everybody ask again, and finds pages that it must not write a second time."""
    need("guest_memfd_no_direct_map")
    assert moved("--slot=guest_memfd", "--inject=daemon-kill@50", *more)["recoveries"] > 0


def read_all(pid: int, rng: random.Random) -> int:
    """Reads guest memory through the mapping of its VMM, as KVM itself does now and then; returns how many pages.
    process_vm_readv() waits for the userfaultfd as the VMM's own threads do; /proc/PID/mem would fail instead."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    pages = [page for found in MAPPED.findall(maps) for page in range(int(found[0], 16), int(found[1], 16), PAGE)]
    buffer = ffi.new("char[]", PAGE)
    here: Any
    there: Any
    here, there = (ffi.new("struct iovec *", {"iov_len": PAGE}) for _ in range(2))
    here.iov_base = buffer
    for page in rng.sample(pages, len(pages)):
        there.iov_base = ffi.cast("void *", page)
        assert libc.process_vm_readv(pid, here, 1, there, 1, 0) == PAGE, os.strerror(ffi.errno)
    return len(pages)


@pytest.fixture
def userfault() -> None:
    need("guest_memfd_userfault")


@pytest.mark.lab
@pytest.mark.usefixtures("userfault")
@pytest.mark.deadline(60)
async def test_the_mapping_is_touched_while_vcpus_leave_for_pages(tmp_path: Path, rng: random.Random) -> None:
    """Both ways at once, on the same pages: each is installed once."""
    plan = Plan(usual(memory="16M", backing="guest_memfd", slot="guest_memfd"), tmp_path, rate=MEMORY // 4)
    async with open_stage(tmp_path) as stage:
        cast = Cast(plan, stage)
        await cast.start_daemon()
        await cast.start_source()
        await cast.start_destination()
        await cast.start_sender()
        await cast.destination.event("ready")
        read = await trio.to_thread.run_sync(read_all, cast.destination.process.pid, rng)
        paused = await cast.source.event("paused")
        done = await cast.destination.event("done")
        await cast.destination.tell("verify", *paused["memory"])
        verified = await cast.destination.event("verified")
        told = await trio.to_thread.run_sync(status.ask, plan.status_socket, {"command": "status"})
    counters = next(m for m in told["finished"] if m["migration"] == MIGRATION)["counters"]
    assert read == MEMORY // PAGE
    assert verified["ok"] is True
    assert counters["faults_vcpu"] == done["vcpu_exits"] > 0
    assert counters["faults_missing"] + counters["faults_minor"] > 0
    assert counters["urgent_pages"] + counters["background_pages"] + counters["zero_pages"] == MEMORY // PAGE


@pytest.mark.usefixtures("require_kvm")
@pytest.mark.parametrize(
    ("backing", "arguments", "lacks"),
    [
        ("guest_memfd", [], "does not let userfaultfd handle guest_memfd"),
        ("guest_memfd_userfault", ["--slot=guest_memfd"], "guest_memfd slot with KVM userfault"),
        ("guest_memfd_no_direct_map", ["--slot=guest_memfd", "--no-direct-map"], "NO_DIRECT_MAP (4) is not among them"),
    ],
)
def test_a_kernel_without_it_is_told_what_to_do(backing: str, arguments: list[str], lacks: str) -> None:
    if getattr(probe, backing)().ok:
        pytest.skip("this kernel has it")
    need_files()
    exit_status, said = run_demo(*arguments)
    assert exit_status == os.EX_UNAVAILABLE
    assert said["ok"] is False
    assert lacks in said["error"]
    assert "make lab-kernel" in said["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backing=memfd", "--slot=guest_memfd"], "--slot guest_memfd needs --backing guest_memfd"),
        (["--no-direct-map"], "--no-direct-map needs --slot guest_memfd"),
        (["--prefault"], "--prefault needs --slot guest_memfd"),
    ],
)
def test_options_that_go_together(arguments: list[str], message: str) -> None:
    exit_status, said = run_demo(*arguments)
    assert exit_status == os.EX_USAGE
    assert message in said["error"]
