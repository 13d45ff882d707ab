"""The words between gmemd and a VMM: datagrams of JSON with descriptors. docs/handoff.md is the specification.

Reading a hand-off is kept apart from what is done with it, so that another dialect can lead to the same `Handoff`.
"""

import array
import contextlib
import fcntl
import json
import os
import reprlib
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from gmemd.errors import HandoffError, KernelError
from gmemd.migrate.wire import MAX_REGIONS, valid_id
from gmemd.native.memory import Region

VERSION = 1
MAX_MESSAGE = 128 * 1024
MAX_DESCRIPTORS = 64
# What a region's fields may be at most: the kernel's own limit of a file's size.
MAX_BYTES = 2**63 - 1
# More vCPUs than KVM gives to one machine.
MAX_VCPUS = 4096
BITMAP_ALIGNMENT = 8
BITMAP_PAGE = 4096  # KVM's, whatever backs the guest
REGION_KEYS = ("file", "offset", "size", "page_size", "gpa")
DESTINATION_KEYS = ("hva", "uffd")
# A VMM's value in a message for people: short, and not as deep as it may be.
_REPR = reprlib.Repr()
_REPR.maxstring = 200
shown = _REPR.repr


def _wrong(what: str) -> HandoffError:
    return HandoffError(f"{what}: sent by the VMM")


@dataclass(slots=True)
class Descriptors:
    """Descriptors that came with a message; closed with it, but for those that were taken."""

    fds: list[int] = field(default_factory=list)

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


@dataclass(frozen=True, slots=True)
class Handoff:
    """A VMM's guest memory. Regions count the descriptors, and so does `faults`."""

    migration: str
    regions: tuple[Region, ...]
    vcpus: int = 0  # that may ask for pages on the socket `faults`
    faults: int | None = None


async def receive(sock: trio.socket.SocketType, flags: int = 0) -> tuple[bytes, Descriptors]:
    """One datagram and its descriptors; b"" when the peer has closed."""
    space = socket.CMSG_SPACE((MAX_DESCRIPTORS + 1) * array.array("i").itemsize)
    data, ancillary, found, _ = await sock.recvmsg(MAX_MESSAGE, space, socket.MSG_CMSG_CLOEXEC | flags)
    descriptors = Descriptors()
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds = array.array("i")
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
            descriptors.fds += fds
    if found & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(descriptors.fds) > MAX_DESCRIPTORS:
        descriptors.close()
        raise _wrong(f"a message of more than {MAX_MESSAGE} bytes or {MAX_DESCRIPTORS} descriptors")
    return data, descriptors


async def send(sock: trio.socket.SocketType, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Sends one datagram; OSError if the peer is gone."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    await sock.sendmsg([json.dumps(message).encode()], rights)


def parse_untrusted(data: bytes) -> dict[str, Any]:
    """The JSON object in a datagram."""
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _wrong(f"not JSON: {error}") from None
    if not isinstance(message, dict):
        raise _wrong("not a JSON object")
    return message


def receive_untrusted(message: dict[str, Any], descriptors: int) -> Handoff:
    """What a VMM asks for at the destination, every number within its bounds."""
    asked = _asked_untrusted(message, descriptors)
    named = {fd for r in asked.regions for fd in (r.file, r.uffd, r.bitmap)} | {asked.faults}
    if len(named - {None}) < descriptors:
        raise _wrong(f"{descriptors} descriptors, {len(named - {None})} of them named")
    return asked


def _asked_untrusted(message: dict[str, Any], descriptors: int) -> Handoff:
    check_version_untrusted(message)
    name = message.get("receive")
    if not valid_id(name):
        raise _wrong(f'"receive" names no migration: {shown(name)}')
    regions = regions_untrusted(message, descriptors, REGION_KEYS + DESTINATION_KEYS)
    if all(region.bitmap is None for region in regions):
        return Handoff(name, regions)
    faults, vcpus = message.get("faults"), message.get("vcpus")
    if type(faults) is not int or not 0 <= faults < descriptors:
        raise _wrong(f'"faults" = {shown(faults)}: regions with a bitmap need a socket to ask on')
    if type(vcpus) is not int or not 0 < vcpus <= MAX_VCPUS:
        raise _wrong(f'"vcpus" = {shown(vcpus)} (1 to {MAX_VCPUS})')
    return Handoff(name, regions, vcpus, faults)


def check_version_untrusted(message: dict[str, Any]) -> None:
    """Refuses a VMM of another version of this protocol."""
    version = message.get("gmemd")
    if type(version) is not int or version != VERSION:
        raise _wrong(f"version {shown(version)} of the hand-off (this is version {VERSION})")


def regions_untrusted(message: dict[str, Any], descriptors: int, keys: Sequence[str]) -> tuple[Region, ...]:
    """The regions of a message."""
    regions = message.get("regions")
    if not isinstance(regions, list) or not 0 < len(regions) <= MAX_REGIONS:
        raise _wrong(f'"regions" is not a list of 1 to {MAX_REGIONS}')
    return tuple(_region_untrusted(index, region, descriptors, keys) for index, region in enumerate(regions))


def _region_untrusted(index: int, region: object, descriptors: int, keys: Sequence[str]) -> Region:
    if not isinstance(region, dict):
        raise _wrong(f"region {index}: not a JSON object")
    values = {}
    for key in keys:
        value = region.get(key)
        most = descriptors - 1 if key in ("file", "uffd") else MAX_BYTES
        if type(value) is not int or not 0 <= value <= most:
            raise _wrong(f"region {index}: {key} = {shown(value)} (a whole number from 0 to {most})")
        values[key] = value
    page_size, size = values["page_size"], values["size"]
    if page_size < 4096 or page_size & (page_size - 1):
        raise _wrong(f"region {index}: page_size = {page_size} (a power of two from 4096 on)")
    for key in ("offset", "size", "gpa", "hva"):
        if values.get(key, 0) % page_size:
            raise _wrong(f"region {index}: {key} = {values[key]} (a multiple of {page_size})")
    if not size:
        raise _wrong(f"region {index}: size = 0")
    return Region(**values, **_bitmap_untrusted(index, region, descriptors))


def _bitmap_untrusted(index: int, region: dict[str, Any], descriptors: int) -> dict[str, int]:
    """The userfault bitmap of a region that has one."""
    if "bitmap" not in region:
        return {}
    bitmap, offset = region["bitmap"], region.get("bitmap_offset", 0)
    if type(bitmap) is not int or not 0 <= bitmap < descriptors:
        raise _wrong(f"region {index}: bitmap = {shown(bitmap)} (a whole number from 0 to {descriptors - 1})")
    if type(offset) is not int or not 0 <= offset <= MAX_BYTES or offset % BITMAP_ALIGNMENT:
        raise _wrong(f"region {index}: bitmap_offset = {shown(offset)} (a multiple of {BITMAP_ALIGNMENT})")
    if region["page_size"] != BITMAP_PAGE:
        raise _wrong(f"region {index}: page_size = {region['page_size']}, but a bitmap is for pages of {BITMAP_PAGE}")
    return {"bitmap": bitmap, "bitmap_offset": offset}


def ranges_untrusted(ranges: object, regions: Sequence[Region]) -> list[tuple[int, int, int]]:
    """Lists of [region, first page, pages], each within its region."""
    if not isinstance(ranges, list):
        raise _wrong("not a list of [region, first page, pages]")
    for index, given in enumerate(ranges):
        whole = isinstance(given, list) and len(given) == 3 and all(type(n) is int and n >= 0 for n in given)
        if not whole or given[0] >= len(regions) or not 0 < given[2] <= regions[given[0]].pages - given[1]:
            raise _wrong(f"range {index}: {shown(given)} lies in no region")
    return [(region, first, pages) for region, first, pages in ranges]


@contextlib.contextmanager
def memory_file(name: str, content: bytes) -> Iterator[int]:
    """A sealed memfd with `content`, for a message to carry. KernelError when there is none to be had."""
    with contextlib.ExitStack() as stack:
        try:
            fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            stack.callback(os.close, fd)
            with open(fd, "wb", closefd=False) as file:
                file.write(content)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        except OSError as error:
            raise KernelError(f"memfd {name} of {len(content)} bytes: {error.strerror}", error.errno or 0) from None
        yield fd


def content(fd: int) -> bytes:
    """All that a memfd holds."""
    return os.pread(fd, os.fstat(fd).st_size, 0)
