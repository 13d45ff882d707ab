"""Frames of the page lanes, written down a second time: from the specification, without the C side."""

import struct
from dataclasses import dataclass, replace
from typing import Self

from gmemd.native import crc32c

HEADER = struct.Struct("<HBBHHQIIII")
MAGIC = 0x4D47
REQUEST, PAGES, ZERO, BEAT = 1, 2, 3, 4
CRC = 1  # the flag
HEADER_CRC_COVERS = 28  # bytes of the header


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A header. The checksums are what it says, whether they are right or wrong."""

    kind: int
    region: int = 0
    first: int = 0
    count: int = 0
    length: int = 0
    flags: int = 0
    crc: int = 0
    magic: int = MAGIC
    reserved: int = 0
    header_crc: int = 0

    def encode(self) -> bytes:
        return HEADER.pack(
            self.magic,
            self.kind,
            self.flags,
            self.region,
            self.reserved,
            self.first,
            self.count,
            self.length,
            self.crc,
            self.header_crc,
        )

    @classmethod
    def decode(cls, data: bytes) -> Self:
        magic, kind, flags, region, reserved, first, count, length, crc, header_crc = HEADER.unpack(data)
        return cls(
            magic=magic,
            kind=kind,
            flags=flags,
            region=region,
            reserved=reserved,
            first=first,
            count=count,
            length=length,
            crc=crc,
            header_crc=header_crc,
        )

    def sealed(self, payload: bytes = b"") -> Self:
        """The same with its checksums. In a request, that of the payload is how long a page was waited for."""
        flagged = replace(self, flags=self.flags | CRC, crc=self.crc if self.kind == REQUEST else crc32c(payload))
        return replace(flagged, header_crc=crc32c(flagged.encode()[:HEADER_CRC_COVERS]))

    def intact(self, payload: bytes = b"") -> bool:
        """Whether the checksums are there and right."""
        return self.sealed(payload) == self


def pages(region: int, first: int, payload: bytes, page_size: int = 4096) -> bytes:
    """A frame of pages, with its content."""
    count = len(payload) // page_size
    frame = Frame(kind=PAGES, region=region, first=first, count=count, length=len(payload))
    return frame.sealed(payload).encode() + payload


def zeros(region: int, first: int, count: int) -> bytes:
    return Frame(kind=ZERO, region=region, first=first, count=count).sealed().encode()


def request(region: int, first: int, count: int = 1, *, waited_us: int = 0) -> bytes:
    return Frame(kind=REQUEST, region=region, first=first, count=count, crc=waited_us).sealed().encode()


def beat() -> bytes:
    return Frame(kind=BEAT).sealed().encode()
