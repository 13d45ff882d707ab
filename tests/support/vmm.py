"""A VMM's end of a hand-off at the destination: memory files, mappings, a userfaultfd, and the guest that touches."""

import ctypes
import json
import mmap
import os
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from gmemd.native import check, lib
from support.polling import PATIENCE

PAGE = 4096
MAX_MESSAGE = 128 * 1024
MAP_NORESERVE = 0x4000
MAP_FIXED = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def _map(address: int | None, size: int, fd: int) -> int:
    """Maps a file, at a certain address over what is there."""
    flags = mmap.MAP_SHARED | MAP_NORESERVE | (MAP_FIXED if address else 0)
    mapped = _libc.mmap(address, size, mmap.PROT_READ, flags, fd, 0)
    assert mapped not in (None, 2**64 - 1), os.strerror(ctypes.get_errno())
    return int(mapped)


class Touch(threading.Thread):
    """A vCPU that reads some bytes. ctypes lets go of the interpreter meanwhile, so nobody else waits with it."""

    def __init__(self, address: int, size: int) -> None:
        super().__init__(name="touch", daemon=True)
        self._address = address
        self._buffer = ctypes.create_string_buffer(size)
        self.start()

    def run(self) -> None:
        ctypes.memmove(self._buffer, self._address, len(self._buffer))

    def result(self) -> bytes:
        """What it has read, when it has."""
        self.join(PATIENCE)
        assert not self.is_alive(), "the vCPU still waits for its page"
        return self._buffer.raw


class Vmm:
    """Guest memory of one region a size. Nothing is sent before `hand_off`."""

    def __init__(self, *sizes: int, features: int = 0) -> None:
        self.sizes = sizes
        self.files: list[int] = []
        self.addresses: list[int] = []
        self.uffd = check(lib.gm_uffd_open, features)
        for size in sizes:
            fd = os.memfd_create("guest")
            os.truncate(fd, size)
            self.files.append(fd)
            self.addresses.append(_map(None, size, fd))
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(PATIENCE)
        self.received: list[int] = []  # descriptors
        self._touches: list[Touch] = []

    @property
    def regions(self) -> list[dict[str, int]]:
        """As the hand-off describes them: the files come first, then the userfaultfd."""
        gpa, regions = 0, []
        for index, (size, address) in enumerate(zip(self.sizes, self.addresses, strict=True)):
            region = {"file": index, "offset": 0, "size": size, "page_size": PAGE, "gpa": gpa, "hva": address}
            regions.append(region | {"uffd": len(self.files)})
            gpa += size
        return regions

    def hand_off(self, daemon: Path, migration: str) -> Self:
        self.connect(daemon)
        self.send({"gmemd": 1, "receive": migration, "regions": self.regions}, [*self.files, self.uffd])
        return self

    def connect(self, daemon: Path) -> None:
        self.socket.connect(str(daemon))

    def send(self, message: dict[str, Any] | bytes, fds: Sequence[int] = ()) -> None:
        data = message if isinstance(message, bytes) else json.dumps(message).encode()
        socket.send_fds(self.socket, [data], fds)

    def receive(self) -> dict[str, Any]:
        """The daemon's next message; {} when it has hung up."""
        data, fds, _, _ = socket.recv_fds(self.socket, MAX_MESSAGE, 64)
        self.received += fds
        return dict(json.loads(data)) if data else {}

    def expect(self, key: str) -> dict[str, Any]:
        message = self.receive()
        assert key in message, message
        return message

    def state(self) -> bytes:
        """Of the memfd that came last."""
        return os.pread(self.received[-1], 1 << 20, 0)

    def touch(self, page: int, *, region: int = 0, pages: int = 1) -> Touch:
        self._touches = [touch for touch in self._touches if touch.is_alive()]
        self._touches.append(Touch(self.addresses[region] + page * PAGE, pages * PAGE))
        return self._touches[-1]

    def read(self, page: int, *, region: int = 0, pages: int = 1) -> bytes:
        """As a vCPU does."""
        return self.touch(page, region=region, pages=pages).result()

    def map_over(self, fd: int, region: int = 0) -> None:
        """Maps another file in place of a region."""
        _map(self.addresses[region], self.sizes[region], fd)

    def content(self, region: int = 0) -> bytes:
        """All of a region, without touching what is not there."""
        return os.pread(self.files[region], self.sizes[region], 0)

    def close(self) -> None:
        """Memory that somebody still waits for, in a test that has failed, stays mapped."""
        os.close(self.uffd)
        self.socket.close()
        if not any(touch.is_alive() for touch in self._touches):
            for address, size in zip(self.addresses, self.sizes, strict=True):
                _libc.munmap(address, size)
        for fd in self.files + self.received:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def main() -> None:
    """A VMM with a process of its own: SOCKET MIGRATION SIZE. Tells each message of the daemon on a line."""
    daemon, migration, size = sys.argv[1:]
    with Vmm(int(size)) as vmm:
        vmm.hand_off(Path(daemon), migration)
        vmm.socket.settimeout(None)
        print("{}", flush=True)
        while message := vmm.receive():
            print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
