"""The reference VMM in a guest_memfd slot: alone as a source; as a destination, whose daemon is played."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from typing import TYPE_CHECKING

import pytest
from support.guest_memfd import need, need_files
from vmm_play import EX_UNAVAILABLE, PAGE, PATIENCE, Event, Guest, Sockets, Vmm, assert_right

from gmemd import probe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytest_plugins = ["vmm_fixtures"]

MACHINE = ["--memory", "4M", "--guest", "kvm", "--backing", "guest_memfd", "--slot", "guest_memfd"]
DATAGRAM = struct.Struct("<IIQ")
EVERY_VCPU = 0xFFFFFFFF


@pytest.mark.usefixtures("require_kvm")
def test_a_source_needs_no_userfault(start: Callable[..., Vmm], sockets: Sockets) -> None:
    vmm = start("source", "--listen", sockets.source, *MACHINE, "--regions", "3", "--vcpus", "2")
    if (event := vmm.event())["event"] == "error":
        pytest.skip(event["message"])
    vmm.expect("running")
    vmm.command("verify")
    assert_right(vmm.expect("verified"))
    assert vmm.end() == 0


@pytest.mark.usefixtures("require_kvm")
@pytest.mark.parametrize(
    ("side", "more", "backing", "message"),
    [
        ("destination", [], "guest_memfd_userfault", "with KVM userfault: Invalid argument: use --slot plain, or"),
        ("source", ["--no-direct-map"], "guest_memfd_no_direct_map", "NO_DIRECT_MAP (4) is not among them"),
    ],
)
def test_a_kernel_that_lacks_it(
    start: Callable[..., Vmm], sockets: Sockets, side: str, more: list[str], backing: str, message: str
) -> None:
    if getattr(probe, backing)().ok:
        pytest.skip("this kernel has it")
    need_files()
    sides = {"source": ["--listen", sockets.source], "destination": ["--gmemd", sockets.daemon, "--migration", "m1"]}
    vmm = start(side, *sides[side], *MACHINE, *more)
    assert message in vmm.expect("error")["message"]
    assert vmm.end() == EX_UNAVAILABLE


class Faults:
    """The daemon's end of the fault socket, and the bitmap, which its pages' content does not wait for."""

    def __init__(self, offer: Event, files: list[int]) -> None:
        self.region = offer["regions"][0]
        self.bitmap = files[self.region["bitmap"]]
        self.socket = socket.socket(fileno=os.dup(files[offer["faults"]]))
        self.socket.settimeout(PATIENCE)

    def bits(self) -> bytes:
        return os.pread(self.bitmap, self.region["size"] // PAGE // 8, self.region["bitmap_offset"])

    def clear(self, page: int) -> None:
        at = self.region["bitmap_offset"] + page // 8
        byte = os.pread(self.bitmap, 1, at)[0]
        os.pwrite(self.bitmap, bytes([byte & ~(1 << page % 8)]), at)

    def clear_all(self) -> None:
        os.pwrite(self.bitmap, bytes(self.region["size"] // PAGE // 8), self.region["bitmap_offset"])

    def request(self) -> tuple[int, int]:
        """vCPU and page."""
        vcpu, zero, gpa = DATAGRAM.unpack(self.socket.recv(DATAGRAM.size + 1))
        assert zero == 0
        return vcpu, gpa // PAGE

    def answer(self, vcpu: int, page: int = 0, pages: int = 0) -> None:
        self.socket.send(DATAGRAM.pack(vcpu, pages, page * PAGE))


@pytest.fixture
def arriving(start: Callable[..., Vmm], sockets: Sockets) -> Iterator[tuple[Guest, Faults]]:
    """A guest that has just been let run, all content in place and all bits set."""
    need("guest_memfd_userfault")
    moved = Guest(start, sockets, *MACHINE, "--vcpus", "2")
    faults = Faults(moved.offer, moved.to)
    assert faults.bits() == b"\xff" * len(faults.bits())
    moved.move()
    yield moved, faults
    faults.socket.close()


def finish(moved: Guest, faults: Faults) -> Event:
    faults.clear_all()
    done = moved.done()
    event = moved.verify()
    assert_right(event)
    return done


@pytest.mark.lab
def test_what_is_handed_over(arriving: tuple[Guest, Faults]) -> None:
    moved, faults = arriving
    assert moved.offer["vcpus"] == 2
    assert "bitmap" not in moved.regions["regions"][0], "a source has none"
    assert fcntl.fcntl(faults.bitmap, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    assert {faults.request()[0] for _ in range(2)} == {0, 1}
    moved.destination.expect("first-instruction")
    finish(moved, faults)


@pytest.mark.lab
def test_a_vcpu_goes_on_when_it_is_answered(arriving: tuple[Guest, Faults]) -> None:
    """An answer for another page, or for none, is of an earlier time, and wakes nobody."""
    moved, faults = arriving
    moved.destination.expect("first-instruction")
    asked = dict(faults.request() for _ in range(2))
    faults.answer(0, asked[0] + 1, 1)
    faults.answer(7, asked[0], 1)
    faults.clear(asked[0])
    faults.answer(0, asked[0], 1)
    vcpu, page = faults.request()
    assert vcpu == 0
    assert page != asked[0]
    assert finish(moved, faults)["vcpu_exits"] == 3


@pytest.mark.lab
def test_a_successor_hears_everything_once_more(arriving: tuple[Guest, Faults]) -> None:
    moved, faults = arriving
    moved.destination.expect("first-instruction")
    asked = dict(faults.request() for _ in range(2))
    faults.answer(EVERY_VCPU)
    assert dict(faults.request() for _ in range(2)) == asked
    assert finish(moved, faults)["vcpu_exits"] == 2, "done answers what is open"


@pytest.mark.lab
def test_answers_may_lie(arriving: tuple[Guest, Faults]) -> None:
    """A vCPU whose bit is still set asks again, whatever it was told."""
    moved, faults = arriving
    moved.destination.expect("first-instruction")
    asked = dict(faults.request() for _ in range(2))
    faults.answer(1, asked[1], 1)
    assert faults.request() == (1, asked[1])
    finish(moved, faults)
