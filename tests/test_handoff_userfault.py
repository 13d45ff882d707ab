"""Hand-offs with KVM userfault, on memfd, vCPUs played: what is wrong with one is said, and the others go on."""

import fcntl
import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from support.recovery import PAGE, Host, Sender, Vmm, content, open_host

from gmemd import handoff
from gmemd.errors import GmemdError
from gmemd.native import check, lib

PAGES = 100
BEFORE = 24  # bytes of the bitmap's file before the bitmap
DATAGRAM = struct.Struct("<IIQ")
MMAP = 1
LOOK_SECONDS = 0.01

pytestmark = pytest.mark.deadline(30)

Message = dict[str, Any]


class AskingVmm(Vmm):
    """Its region is the middle of a file, between two pages of its own; `ask` is its end of the fault socket."""

    def __init__(self, migration: str) -> None:
        super().__init__(migration, PAGES + 2)
        self.bitmap = self.owned(os.memfd_create("bitmap", os.MFD_ALLOW_SEALING))
        os.pwrite(self.bitmap, b"\xff" * PAGE, 0)
        fcntl.fcntl(self.bitmap, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.faults = self.owned(ends[1].detach())
        self.ask = trio.socket.from_stdlib_socket(ends[0])
        self._stack.callback(self.ask.close)
        self.region = {
            "file": 0,
            "offset": PAGE,
            "size": PAGES * PAGE,
            "page_size": PAGE,
            "gpa": 0,
            "hva": self.hva + PAGE,
            "uffd": 1,
            "bitmap": 2,
            "bitmap_offset": BEFORE,
        }
        self.message: Message = {"gmemd": 1, "receive": migration, "regions": [self.region], "vcpus": 2, "faults": 3}

    def owned(self, fd: int) -> int:
        self._stack.callback(os.close, fd)
        return fd

    async def hand_over(self, path: Path) -> None:
        await self._socket.connect(str(path))
        await handoff.send(self._socket, self.message, [self.file, self.uffd, self.bitmap, self.faults])

    async def page(self, number: int) -> bytes:
        """What a vCPU finds in a page of the region, which it asks for."""
        await self.ask.send(DATAGRAM.pack(1, 0, number * PAGE))
        vcpu, pages, gpa = DATAGRAM.unpack(await self.ask.recv(64))
        assert (vcpu, gpa) == (1, number * PAGE)
        assert pages >= 1
        return self.held(number)

    def held(self, number: int) -> bytes:
        return os.pread(self.file, PAGE, (number + 1) * PAGE)

    def untouched(self) -> None:
        """Nobody wrote beside the region and its bitmap."""
        assert os.pread(self.file, PAGE, 0) == os.pread(self.file, PAGE, (PAGES + 1) * PAGE) == bytes(PAGE)
        bits = os.pread(self.bitmap, PAGE, 0)
        assert bits[:BEFORE] == b"\xff" * BEFORE
        assert bits[BEFORE + 16 :] == b"\xff" * (PAGE - BEFORE - 16)


async def another_completes(host: Host) -> None:
    """The daemon is as good as before."""
    async with host.migration("another", PAGES) as (vmm, sender), trio.open_nursery() as nursery:
        nursery.start_soon(sender.run)
        assert (await vmm.hear())["ready"]
        assert (await vmm.hear())["done"]
        assert vmm.wrong() == []


def too_small(vmm: AskingVmm) -> None:
    vmm.region["bitmap_offset"] = PAGE - 8


def beyond_the_end(vmm: AskingVmm) -> None:
    vmm.region["bitmap_offset"] = 2**63 - 8


def unsealed(vmm: AskingVmm) -> None:
    vmm.bitmap = vmm.owned(os.memfd_create("unsealed", os.MFD_ALLOW_SEALING))
    os.truncate(vmm.bitmap, PAGE)


def no_memfd(vmm: AskingVmm) -> None:
    vmm.bitmap = vmm.uffd


def no_such_descriptor(vmm: AskingVmm) -> None:
    vmm.region["bitmap"] = 4


def crooked(vmm: AskingVmm) -> None:
    vmm.region["bitmap_offset"] = 4


def nowhere_to_ask(vmm: AskingVmm) -> None:
    del vmm.message["faults"]


def asks_on_a_file(vmm: AskingVmm) -> None:
    vmm.faults = vmm.bitmap


def asks_on_a_stream(vmm: AskingVmm) -> None:
    ends = socket.socketpair()
    vmm.faults = vmm.owned(ends[0].detach())
    ends[1].close()


def without_vcpus(vmm: AskingVmm) -> None:
    vmm.message["vcpus"] = 0


WRONG = [
    (too_small, "region 0: its userfault bitmap has 4096 bytes, 4104 are needed: sent by the VMM"),
    (beyond_the_end, "region 0: its userfault bitmap has 4096 bytes, 9223372036854775816 are needed"),
    (unsealed, "region 0: its userfault bitmap is not sealed against shrinking: sent by the VMM"),
    (no_memfd, "region 0: its userfault bitmap is no memfd of base pages: sent by the VMM"),
    (no_such_descriptor, "region 0: bitmap = 4"),
    (crooked, "region 0: bitmap_offset = 4 (a multiple of 8): sent by the VMM"),
    (nowhere_to_ask, '"faults" = None: regions with a bitmap need a socket to ask on: sent by the VMM'),
    (asks_on_a_file, '"faults" is not a SOCK_SEQPACKET socket: sent by the VMM'),
    (asks_on_a_stream, '"faults" is not a SOCK_SEQPACKET socket: sent by the VMM'),
    (without_vcpus, '"vcpus" = 0 (1 to 4096): sent by the VMM'),
]


async def test_hand_offs_that_are_wrong_are_refused(tmp_path: Path) -> None:
    async with open_host(tmp_path) as host:
        for spoil, message in WRONG:
            with AskingVmm("wrong") as vmm:
                spoil(vmm)
                await vmm.hand_over(host.handoff)
                answer = await vmm.hear()
                assert message in answer["error"]
                assert os.pread(vmm.file, (PAGES + 2) * PAGE, 0) == bytes((PAGES + 2) * PAGE)
        await another_completes(host)


@pytest.mark.usefixtures("require_kvm")
@pytest.mark.parametrize(("flags", "lacks"), [(0, "GUEST_MEMFD_FLAG_MMAP"), (MMAP, "GUEST_MEMFD_FLAG_INIT_SHARED")])
async def test_a_guest_memfd_that_nobody_can_reach_is_refused(flags: int, lacks: str, tmp_path: Path) -> None:
    try:
        file = check(lib.gm_memfile_guest_memfd, (PAGES + 2) * PAGE, flags)
    except GmemdError as error:
        pytest.skip(str(error))
    async with open_host(tmp_path) as host:
        with AskingVmm("unreachable") as vmm:
            own, vmm.file = vmm.file, file
            await vmm.hand_over(host.handoff)
            vmm.file = own
            answer = await vmm.hear()
        os.close(file)
        assert answer["error"] == f"region 0: a guest_memfd made without {lacks}: sent by the VMM"
        await another_completes(host)


@asynccontextmanager
async def arriving(folder: Path) -> AsyncIterator[tuple[Host, AskingVmm]]:
    """A guest that runs, and has one page; others come when they are asked for."""
    async with open_host(folder) as host:
        with AskingVmm("asking") as vmm, Sender("asking", PAGES, host.plan.port) as sender:
            await vmm.hand_over(host.handoff)
            await host.until("asking", phase="waiting")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(sender.run, background=False))
                assert (await vmm.hear())["ready"]
                assert await vmm.page(PAGES - 1) == content(PAGES - 1)
                yield host, vmm
                nursery.cancel_scope.cancel()


async def logged(host: Host, message: str) -> None:
    while message not in host.log:
        await trio.sleep(LOOK_SECONDS)  # a log tells nobody


@pytest.mark.parametrize(
    ("datagram", "message"),
    [
        (DATAGRAM.pack(2, 0, 0), "fault socket: vCPU 2 of 2: sent by the VMM"),
        (DATAGRAM.pack(0, 0, PAGES * PAGE), "guest physical address 0x64000 lies in no region"),
        (DATAGRAM.pack(0, 0, 2**64 - 1), "guest physical address 0xffffffffffffffff lies in no region"),
        (bytes(17), "fault socket: a message of 17 bytes"),
    ],
    ids=["vcpu", "gpa", "far-gpa", "length"],
)
async def test_a_vmm_that_asks_for_what_there_is_not(datagram: bytes, message: str, tmp_path: Path) -> None:
    """It is not heard any more. Its memory arrives all the same, and nothing beside it."""
    async with arriving(tmp_path) as (host, vmm):
        await vmm.ask.send(datagram)
        await logged(host, message)
        await another_completes(host)
        assert [await vmm.read(page + 1) for page in range(PAGES)] == [content(page) for page in range(PAGES)]
        assert (await vmm.hear())["done"]
        vmm.untouched()


async def ask_for_ever(vmm: AskingVmm) -> None:
    while True:
        await vmm.ask.send(DATAGRAM.pack(0, 0, (PAGES - 1) * PAGE))


async def test_a_vmm_that_never_reads_is_alone_with_it(tmp_path: Path) -> None:
    async with arriving(tmp_path) as (host, vmm), trio.open_nursery() as nursery:
        nursery.start_soon(ask_for_ever, vmm)
        await logged(host, "full of answers that the VMM does not read")
        await another_completes(host)
        nursery.cancel_scope.cancel()
        vmm.untouched()
