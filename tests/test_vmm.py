"""The reference VMM without gmemd: guests alone, and guests whose memory the test copies itself."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from vmm_play import PAGE, PATIENCE, Guest, Sockets, Vmm, assert_right

from gmemd_tools import tmpfs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytest_plugins = ["vmm_fixtures"]


@pytest.mark.parametrize("pattern", ["sequential", "random", "strided", "hotset"])
def test_a_guest_alone_does_what_the_model_says(
    start: Callable[..., Vmm], sockets: Sockets, guest: str, pattern: str
) -> None:
    vmm = start(
        "source", "--listen", sockets.source, "--memory", "16M", "--vcpus", "3",
        "--guest", guest, "--pattern", pattern, "--seed", "7",
    )  # fmt: skip
    filled = vmm.expect("filled")
    assert filled["guest"] == guest
    vmm.expect("running")
    vmm.command("verify")
    event = vmm.expect("verified")
    assert_right(event)
    assert event["guest_verified"] == filled["data_pages"]
    assert vmm.end() == 0


def test_the_fill_leaves_holes(start: Callable[..., Vmm], sockets: Sockets, guest: str) -> None:
    vmm = start(
        "source", "--listen", sockets.source, "--memory", "64M", "--zero-share", "40",
        "--guest", guest, "--rate", "1",
    )  # fmt: skip
    vmm.expect("filled")
    vmm.expect("running")
    _, files = sockets.to_source().ask({"gmemd": 1, "send": "m1"})
    share = 1 - os.fstat(files[0]).st_blocks * 512 / (64 << 20)
    assert 0.36 < share < 0.44


MACHINES = [
    pytest.param(["--memory", "32M", "--vcpus", "1"], id="1-vcpu"),
    pytest.param(["--memory", "48M", "--vcpus", "4", "--regions", "5"], id="4-vcpus-5-regions"),
    pytest.param(["--memory", "64M", "--vcpus", "8", "--regions", "64"], id="8-vcpus-64-regions"),
    pytest.param(["--memory", "33M", "--vcpus", "2", "--regions", "2"], id="odd-size"),
]


@pytest.mark.parametrize("machine", MACHINES)
def test_a_guest_moves(start: Callable[..., Vmm], sockets: Sockets, guest: str, machine: list[str]) -> None:
    moved = Guest(start, sockets, *machine, "--guest", guest)
    moved.move()
    first = moved.destination.expect("first-instruction")
    assert 0 <= first["at_ns"] - moved.paused["at_ns"] == pytest.approx(first["downtime_us"] * 1000, abs=1000)
    moved.done()
    event = moved.verify()
    assert_right(event)
    assert event["against_source"] > 0
    assert all(new >= old for new, old in zip(event["steps"], moved.paused["steps"], strict=True))
    assert moved.destination.end() == 0


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """48 more huge pages of 2 MiB, given back afterwards."""
    pool = Path("/proc/sys/vm/nr_hugepages")
    before = int(pool.read_text())
    try:
        pool.write_text(str(before + 48))
    except OSError as error:
        pytest.skip(f"no huge pages are to be had: {error.strerror}")
    try:
        if int(pool.read_text()) < before + 48:
            pytest.skip("no 48 huge pages are to be had: memory is scarce or in pieces")
        yield
    finally:
        pool.write_text(str(before))


@pytest.mark.usefixtures("huge_pages")
@pytest.mark.parametrize("backing", ["hugetlb", "mixed"])
def test_a_guest_moves_in_huge_pages(start: Callable[..., Vmm], sockets: Sockets, guest: str, backing: str) -> None:
    machine = ["--memory", "48M", "--vcpus", "2", "--regions", "4", "--backing", backing, "--guest", guest]
    moved = Guest(start, sockets, *machine)
    sizes = {region["page_size"] for region in moved.offer["regions"]}
    assert sizes == ({2 << 20} if backing == "hugetlb" else {2 << 20, PAGE})
    for region in moved.offer["regions"]:
        assert region["hva"] % region["page_size"] == region["gpa"] % region["page_size"] == 0
    moved.move()
    moved.destination.expect("first-instruction")
    moved.done()
    assert_right(moved.verify())


def assert_moves(moved: Guest) -> None:
    moved.move()
    moved.destination.expect("first-instruction")
    moved.done()
    event = moved.verify()
    assert_right(event)
    assert event["against_source"] > 0


@pytest.mark.skipif(tmpfs.missing() is not None, reason=str(tmpfs.missing()))
def test_a_guest_moves_in_large_folios(start: Callable[..., Vmm], sockets: Sockets, guest: str) -> None:
    moved = Guest(start, sockets, "--memory", "33M", "--regions", "3", "--backing", "tmpfs", "--guest", guest)
    assert_moves(moved)


@pytest.mark.usefixtures("require_kvm")
def test_a_guest_moves_in_guest_memfd(start: Callable[..., Vmm], sockets: Sockets) -> None:
    machine = ["--memory", "32M", "--regions", "3", "--backing", "guest_memfd", "--guest", "kvm"]
    probe = start("source", "--listen", sockets.source, *machine)
    if probe.event()["event"] == "error":
        pytest.skip("this kernel has no guest_memfd that can be mapped")
    probe.end()
    moved = Guest(start, sockets, *machine)
    assert_moves(moved)


def test_the_hand_off_is_as_documented(start: Callable[..., Vmm], sockets: Sockets) -> None:
    moved = Guest(start, sockets, "--memory", "40M", "--regions", "6")
    assert moved.offer["gmemd"] == 1
    assert moved.offer["receive"] == "m1"
    gpa = 0
    for there, here in zip(moved.regions["regions"], moved.offer["regions"], strict=True):
        assert {**here, **there} == here
        assert set(here) - set(there) == {"hva", "uffd"}
        assert here["gpa"] == gpa
        gpa += here["size"]
        assert os.fstat(moved.to[here["file"]]).st_size >= here["offset"] + here["size"]
    assert gpa == 40 << 20
    assert [region["size"] // PAGE % 2 for region in moved.offer["regions"][:-1]] == [1] * 5
    uffd = moved.to[moved.offer["regions"][0]["uffd"]]
    assert os.readlink(f"/proc/self/fd/{uffd}") == "anon_inode:[userfaultfd]"
    assert fcntl.fcntl(uffd, fcntl.F_GETFL) & os.O_NONBLOCK
    # Nothing of its memory has been touched.
    assert [os.fstat(file).st_blocks for file in moved.to[:-1]] == [0] * 3


UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_CONTINUE = 0xC020AA00, 0x8010AA01, 0xC020AA07
UFFD_PAGEFAULT = 0x12
REGISTER_MISSING, REGISTER_MINOR = 1, 4


class Pager:
    """Answers faults at a destination with pages of the source, one at a time, until it is told to bring all."""

    def __init__(self, moved: Guest) -> None:
        self.region = moved.offer["regions"][0]
        self.size = self.region["size"]
        self.file, self.uffd = moved.to
        self.source = mmap.mmap(moved.since[0], self.size)
        self.missing = set(range(0, self.size, PAGE))
        self.faults = 0

    def register(self) -> None:
        modes = REGISTER_MISSING | REGISTER_MINOR
        fcntl.ioctl(self.uffd, UFFDIO_REGISTER, struct.pack("<4Q", self.region["hva"], self.size, modes, 0))

    def bring(self, offset: int) -> None:
        if offset in self.missing:
            self.missing.remove(offset)
            os.pwrite(self.file, self.source[offset : offset + PAGE], offset)
        resume = struct.pack("<4Q", self.region["hva"] + offset, PAGE, 0, 0)
        with contextlib.suppress(FileExistsError):
            fcntl.ioctl(self.uffd, UFFDIO_CONTINUE, resume)

    def answer(self, faults: int) -> None:
        while self.faults < faults:
            assert select.select([self.uffd], [], [], PATIENCE)[0], "nothing faults"
            try:
                event, address = struct.unpack("<B15xQ8x", os.read(self.uffd, 32))
            except BlockingIOError:  # the page before had woken this one, too
                continue
            assert event == UFFD_PAGEFAULT
            self.faults += 1
            self.bring((address & -PAGE) - self.region["hva"])

    def finish(self) -> None:
        for offset in sorted(self.missing):
            self.bring(offset)
        fcntl.ioctl(self.uffd, UFFDIO_UNREGISTER, struct.pack("<QQ", self.region["hva"], self.size))

    def close(self) -> None:
        self.source.close()


@pytest.mark.parametrize("backing", ["memfd", "guest_memfd"])
def test_a_guest_runs_while_its_pages_come_one_by_one(
    start: Callable[..., Vmm], sockets: Sockets, guest: str, backing: str
) -> None:
    if (guest, backing) == ("threads", "guest_memfd"):
        pytest.skip("guest_memfd is made by KVM")
    machine = ["--memory", "8M", "--vcpus", "2", "--guest", guest, "--backing", backing]
    moved = Guest(start, sockets, *machine)
    moved.pause()
    with contextlib.closing(Pager(moved)) as pager:
        try:
            pager.register()
        except OSError as error:
            pytest.skip(f"userfaultfd on {backing}: {error.strerror}")
        moved.ready()
        pager.answer(500)
        moved.destination.expect("ready")
        moved.destination.expect("first-instruction")
        moved.destination.command("verify")
        assert "not complete" in moved.destination.expect("refused")["message"]
        pager.finish()
    moved.done()
    event = moved.verify()
    assert_right(event)
    assert event["touches"] > 400  # the others are for the low area
    assert sum(event["steps"]) > sum(moved.paused["steps"])
    assert 0 < event["touch_latency_us"]["p50"] <= event["touch_latency_us"]["p99"]
    assert event["touch_latency_us"]["p99"] <= event["touch_latency_us"]["max"]
    assert event["blocked_us"] >= 400 * event["touch_latency_us"]["p50"]
    assert 0.05 < event["blocked_share"] <= 1


def test_it_can_quit_while_its_vcpus_wait_for_pages(start: Callable[..., Vmm], sockets: Sockets, guest: str) -> None:
    moved = Guest(start, sockets, "--memory", "8M", "--vcpus", "2", "--guest", guest)
    moved.pause()
    with contextlib.closing(Pager(moved)) as pager:
        pager.register()
        moved.ready()
        pager.answer(20)
    moved.destination.command("quit")
    assert moved.destination.end() == 0


def test_under_sanitizers(start: Callable[..., Vmm], sockets: Sockets, guest: str, sanitized: Path) -> None:
    def start_sanitized(*arguments: object) -> Vmm:
        return start(*arguments, program=sanitized)

    moved = Guest(start_sanitized, sockets, "--memory", "8M", "--vcpus", "2", "--regions", "3", "--guest", guest)
    moved.move()
    moved.destination.expect("first-instruction")
    moved.done()
    moved.sender.send({"done": True})
    moved.source.expect("done")
    assert_right(moved.verify())
    assert moved.destination.end() == 0
    assert moved.source.end() == 0
