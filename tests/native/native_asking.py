"""A guest with KVM userfault: vCPUs that leave KVM_RUN are played, the bitmap and the fault socket are real."""

import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from native_rig import PAGE, PATIENCE, Far, Guest, RunningPager, Way

from gmemd.native.memory import Memory, Populate, Region

DATAGRAM = struct.Struct("<IIQ")
EVERY_VCPU = 0xFFFFFFFF


def sealed(size: int, seals: int = fcntl.F_SEAL_SHRINK) -> int:
    fd = os.memfd_create("bitmap", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.pwrite(fd, b"\xff" * size, 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


class AskingGuest(Guest):
    """`shapes` as for Guest. Its regions' bitmaps lie in one memfd, some bytes apart; `ends` are those of the fault
    socket, the VMM's first."""

    def __init__(self, *shapes: tuple[int, int], vcpus: int = 4, populate: Way = Populate.WRITE) -> None:
        super().__init__(*shapes, populate=populate)
        self.ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in self.ends:
            self._stack.callback(end.close)
        self.ends[0].settimeout(PATIENCE)
        self.destination.set_vcpus(self.ends[1].fileno(), vcpus)

    def new_memory(self, regions: list[Region]) -> Memory:
        at = 16
        asking = []
        for region in regions:
            asking.append(replace(region, bitmap=len(self.files), bitmap_offset=at))
            at += 8 * (region.pages // 64 + 2)
        self.bitmaps = self._own(sealed(at))
        return Memory("test", asking, [*self.files, self.bitmaps], self.uffds)

    def ask(self, vcpu: int, page: int, region: int = 0) -> None:
        self.ends[0].send(DATAGRAM.pack(vcpu, 0, self.gpa(page, region)))

    def gpa(self, page: int, region: int = 0) -> int:
        return self.memory.regions[region].gpa + page * PAGE

    def answer(self) -> tuple[int, int, int]:
        """The next one: vCPU, pages, guest physical address."""
        return DATAGRAM.unpack(self.ends[0].recv(DATAGRAM.size + 1))

    def stops(self, region: int = 0) -> set[int]:
        """Pages whose bit makes a vCPU ask, among those that the bitmap's words have bits for."""
        known = self.memory.regions[region]
        bits = int.from_bytes(os.pread(self.bitmaps, (known.pages + 63) // 64 * 8, known.bitmap_offset), "little")
        return {page for page in range((known.pages + 63) // 64 * 64) if bits >> page & 1}


@contextmanager
def asked(guest: AskingGuest) -> Iterator[Far]:
    """A pager serves it; what it asks for comes to the test."""
    with RunningPager() as running, running.serving(guest) as far:
        yield far
