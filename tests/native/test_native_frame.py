"""The header of a frame: what is read is what was written, and nothing that is out of bounds gets through."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_frames import BEAT, CRC, MAGIC, PAGES, REQUEST, ZERO, Frame

from gmemd.errors import LinkError, ProtocolError
from gmemd.native import check, ffi, lib
from gmemd.native.memory import Memory, Region

PAGE, HUGE = 4096, 2 << 20
SMALL_PAGES, HUGE_PAGES = 1000, 3
# Nothing is mapped or read here: the files need not exist.
REGIONS = [
    Region(offset=0, size=SMALL_PAGES * PAGE, page_size=PAGE, gpa=0),
    Region(offset=0, size=HUGE_PAGES * HUGE, page_size=HUGE, gpa=1 << 30),
]
GOOD = Frame(kind=PAGES, region=0, first=7, count=2, length=2 * PAGE)
GOOD_HUGE = Frame(kind=PAGES, region=1, first=2, count=1, length=HUGE)
GOOD_ZERO = Frame(kind=ZERO, region=0, first=SMALL_PAGES - 64, count=64)
GOOD_REQUEST = Frame(kind=REQUEST, region=1, first=2, count=1)


@contextmanager
def memory() -> Iterator[Memory]:
    with Memory("m", REGIONS, [-1]) as made:
        yield made


def decode(memory: Memory, data: bytes, *, from_source: bool = True, checksum: bool = False) -> Any:
    frame = ffi.new("struct gm_frame *")
    check(lib.gm_frame_decode_untrusted, data, memory.native, from_source, checksum, b"lane", frame)
    return frame


@st.composite
def good_frames(draw: st.DrawFn) -> Frame:
    kind, payload = draw(st.sampled_from([REQUEST, PAGES, ZERO, BEAT])), draw(st.binary(max_size=8))
    sealed = draw(st.booleans())
    if kind == BEAT:
        return Frame(kind=kind).sealed() if sealed else Frame(kind=kind)
    region = draw(st.integers(0, 1))
    total, most, size = ((SMALL_PAGES, 64, PAGE), (HUGE_PAGES, 1, HUGE))[region]
    count = draw(st.integers(1, most))
    first = draw(st.integers(0, total - count))
    length = count * size if kind == PAGES else 0
    frame = Frame(kind=kind, region=region, first=first, count=count, length=length)
    return frame.sealed(payload) if sealed else frame


@given(frame=good_frames())
def test_round_trip(frame: Frame) -> None:
    """What is written reads back the same, by our decoder and by one made from the specification."""
    given_to_c = ffi.new("struct gm_frame *")
    for name in ("kind", "flags", "region", "first", "count", "length", "crc"):
        setattr(given_to_c, name, getattr(frame, name))
    out = ffi.new("unsigned char[]", lib.GM_HEADER_BYTES)
    lib.gm_frame_encode(given_to_c, out)
    assert Frame.decode(bytes(out)) == frame
    with memory() as known:
        read = decode(known, bytes(out), from_source=frame.kind != REQUEST, checksum=bool(frame.flags))
        assert all(
            getattr(read, name) == getattr(frame, name)
            for name in ("kind", "flags", "region", "first", "count", "length", "crc")
        )


BAD = {
    "magic": (replace(GOOD, magic=MAGIC ^ 1), "0x4d46"),
    "flags": (replace(GOOD, flags=2), "flags 0x2"),
    "reserved": (replace(GOOD, reserved=1), "reserved bytes"),
    "reserved, high": (replace(GOOD, reserved=1 << 15), "reserved bytes"),
    "kind 0": (replace(GOOD, kind=0), "kind 0"),
    "kind 5": (replace(GOOD, kind=5), "kind 5"),
    "region": (replace(GOOD, region=2), "region 2 of 2"),
    "region 65535": (replace(GOOD, region=65535), "region 65535 of 2"),
    "first": (replace(GOOD, first=SMALL_PAGES), "page 1000 outside region 0"),
    "first in the next region": (replace(GOOD_HUGE, first=3), "page 3 outside region 1"),
    "first beyond 64 bits": (replace(GOOD, first=2**64 - 1), f"page {2**64 - 1} outside region 0"),
    "last": (replace(GOOD, first=SMALL_PAGES - 1), "page 1000 outside region 0"),
    "no pages": (replace(GOOD, count=0, length=0), "0 pages"),
    "no zero pages": (replace(GOOD_ZERO, count=0), "0 pages"),
    "65 pages": (replace(GOOD, count=65, length=65 * PAGE), "65 pages"),
    "65 zero pages": (replace(GOOD_ZERO, first=0, count=65), "65 pages"),
    "2^32 - 1 pages": (replace(GOOD, count=2**32 - 1), "4294967295 pages"),
    "two huge pages": (replace(GOOD_HUGE, first=0, count=2, length=2 * HUGE), "2 pages"),
    "length 0": (replace(GOOD, length=0), "0 bytes"),
    "a byte less": (replace(GOOD, length=2 * PAGE - 1), "8191 bytes"),
    "a byte more": (replace(GOOD, length=2 * PAGE + 1), "8193 bytes"),
    "2^32 - 1 bytes": (replace(GOOD, length=2**32 - 1), "4294967295 bytes"),
    "zero pages with content": (replace(GOOD_ZERO, length=PAGE), "4096 bytes"),
    "a beat for a region": (Frame(kind=BEAT, region=1), "beat"),
    "a beat for a page": (Frame(kind=BEAT, first=1), "beat"),
    "a beat with pages": (Frame(kind=BEAT, count=1), "beat"),
    "a beat with content": (Frame(kind=BEAT, length=1), "beat"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_field_out_of_bounds_is_named(what: str) -> None:
    frame, text = BAD[what]
    with memory() as known, pytest.raises(ProtocolError, match=f"^lane: .*{text}.*: sent by the source$"):
        decode(known, frame.encode())


BAD_REQUESTS = {
    "pages": (GOOD, "kind 2"),
    "zero pages": (GOOD_ZERO, "kind 3"),
    "region": (replace(GOOD_REQUEST, region=2), "region 2 of 2"),
    "first": (replace(GOOD_REQUEST, first=3), "page 3 outside region 1"),
    "no pages": (replace(GOOD_REQUEST, count=0), "0 pages"),
    "with content": (replace(GOOD_REQUEST, length=HUGE), "2097152 bytes"),
}


@pytest.mark.parametrize("what", BAD_REQUESTS)
def test_a_bad_request_is_named(what: str) -> None:
    frame, text = BAD_REQUESTS[what]
    with memory() as known, pytest.raises(ProtocolError, match=f"^lane: .*{text}.*: sent by the destination$"):
        decode(known, frame.encode(), from_source=False)


def test_a_request_does_not_come_from_the_source() -> None:
    with memory() as known, pytest.raises(ProtocolError, match="kind 1: sent by the source"):
        decode(known, GOOD_REQUEST.encode())


def fits(frame: Frame, *, from_source: bool) -> bool:
    """What the specification allows, in one expression."""
    if frame.magic != MAGIC or frame.reserved or frame.flags & ~CRC:
        return False
    if frame.kind == BEAT:
        return not (frame.region or frame.first or frame.count or frame.length)
    if frame.kind not in ((PAGES, ZERO) if from_source else (REQUEST,)) or frame.region > 1:
        return False
    total, most, size = ((SMALL_PAGES, 64, PAGE), (HUGE_PAGES, 1, HUGE))[frame.region]
    length = frame.count * size if frame.kind == PAGES else 0
    return 1 <= frame.count <= most and frame.first + frame.count <= total and frame.length == length


def mutations(rng: random.Random) -> Iterator[bytes]:
    """Random bytes, and good headers with something in them changed."""
    for good in (GOOD, GOOD_HUGE, GOOD_ZERO, GOOD_REQUEST, Frame(kind=BEAT)):
        for _ in range(4000):
            data = bytearray(rng.randbytes(32) if rng.random() < 0.1 else good.encode())
            for _ in range(rng.randint(0, 3)):
                data[rng.randrange(32)] = rng.choice([0, 1, 2, 64, 255, rng.randrange(256)])
            yield bytes(data)


@pytest.mark.parametrize("from_source", [True, False])
def test_32_bytes_are_a_good_frame_or_a_protocol_error(rng: random.Random, from_source: bool) -> None:
    seen = {True: 0, False: 0}
    with memory() as known:
        for data in mutations(rng):
            expected = fits(Frame.decode(data), from_source=from_source)
            seen[expected] += 1
            try:
                decode(known, data, from_source=from_source)
            except ProtocolError:
                assert not expected, data.hex()
            else:
                assert expected, data.hex()
    assert min(seen.values()) > 500, "the mutations tell both apart"


def plain_crc32c(data: bytes) -> int:
    """Bit by bit, as the definition has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


# RFC 3720 B.4, and the check value of the CRC catalogues.
VECTORS = {
    bytes(32): 0x8A9136AA,
    bytes([255] * 32): 0x62A8AB43,
    bytes(range(32)): 0x46DD794E,
    bytes(range(31, -1, -1)): 0x113FDB5C,
    bytes.fromhex(
        "01c00000 00000000 00000000 00000000 14000000 00000400 00000014 00000018 28000000 00000000 02000000 00000000"
    ): 0xD9963A56,
    b"123456789": 0xE3069283,
    b"": 0,
}


@pytest.mark.parametrize("function", [lib.gm_crc32c, lib.gm_crc32c_portable])
def test_crc_vectors(function: Any) -> None:
    for data, crc in VECTORS.items():
        assert function(0, data, len(data)) == crc
        assert plain_crc32c(data) == crc


@given(data=st.binary(max_size=200), cut=st.integers(0, 200), shift=st.integers(0, 7))
def test_crc_ways_agree(data: bytes, cut: int, shift: int) -> None:
    """The CPU's instruction, the tables and the plain definition; in one go and in two; at any alignment."""
    held = ffi.new("unsigned char[]", bytes(shift) + data)
    at, first = held + shift, min(cut, len(data))
    for function in (lib.gm_crc32c, lib.gm_crc32c_portable):
        assert function(0, at, len(data)) == plain_crc32c(data)
        assert function(function(0, at, first), at + first, len(data) - first) == plain_crc32c(data)


@pytest.mark.parametrize("good", [GOOD, GOOD_HUGE, GOOD_ZERO, Frame(kind=BEAT)])
def test_every_flipped_bit_of_a_header_is_damage(good: Frame) -> None:
    """The link's fault, whichever field it looks like: no peer is blamed, and no page is believed."""
    sealed = good.sealed()
    with memory() as known:
        decode(known, sealed.encode(), checksum=True)
        for bit in range(8 * lib.GM_HEADER_BYTES):
            data = bytearray(sealed.encode())
            data[bit // 8] ^= 1 << bit % 8
            with pytest.raises(LinkError, match="lane: a damaged header"):
                decode(known, bytes(data), checksum=True)


def test_a_header_without_its_checksum_is_damage() -> None:
    with memory() as known, pytest.raises(LinkError, match="damaged header"):
        decode(known, GOOD.encode(), checksum=True)


def test_every_flipped_bit_of_a_page_changes_its_checksum() -> None:
    payload = bytearray(random.Random(1).randbytes(PAGE))
    right = lib.gm_crc32c(0, bytes(payload), PAGE)
    for bit in range(8 * PAGE):
        payload[bit // 8] ^= 1 << bit % 8
        assert lib.gm_crc32c(0, bytes(payload), PAGE) != right
        payload[bit // 8] ^= 1 << bit % 8
    assert lib.gm_crc32c(0, bytes(payload), PAGE) == right
