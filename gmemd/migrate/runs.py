"""Sets of pages as runs, and their code on the wire: numbers alternately of pages out of the set and in it, each as
LEB128."""

from collections.abc import Iterable, Iterator

from gmemd.errors import ProtocolError

Run = tuple[int, int]  # first page, pages

# A chunk of coded runs, so that a control message stays small whatever the guest's size.
CHUNK_BYTES = 32 * 1024
# A number of pages: 2^40 pages of 4 KiB are 4 PiB.
NUMBER_BYTES = 6


def _encode_number(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def encode(runs: Iterable[Run]) -> Iterator[tuple[int, bytes]]:
    """Codes ascending runs as chunks (start, code): a chunk's first gap is counted from its `start`."""
    start = at = 0
    code = bytearray()
    for first, pages in runs:
        if len(code) > CHUNK_BYTES - 2 * NUMBER_BYTES:
            yield start, bytes(code)
            start, code = at, bytearray()
        code += _encode_number(first - at) + _encode_number(pages)
        at = first + pages
    if code:
        yield start, bytes(code)


def _numbers_untrusted(code: bytes) -> Iterator[int]:
    number = shift = 0
    for byte in code:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield number
            number = shift = 0
        elif shift >= 7 * NUMBER_BYTES:
            raise ProtocolError(f"runs: a number of more than {NUMBER_BYTES} bytes")
    if shift:
        raise ProtocolError("runs: cut off in the middle of a number")


def decode_untrusted(start: int, code: bytes, pages: int) -> list[Run]:
    """The runs of one chunk, each checked to lie within a region of `pages` pages."""
    numbers = list(_numbers_untrusted(code))
    if len(numbers) % 2:
        raise ProtocolError("runs: a gap without a run")
    runs = []
    for gap, length in zip(numbers[::2], numbers[1::2], strict=True):
        if length == 0:
            raise ProtocolError("runs: a run of no pages")
        if start + gap + length > pages:
            raise ProtocolError(f"runs: page {start + gap + length - 1} outside a region of {pages} pages")
        runs.append((start + gap, length))
        start += gap + length
    return runs
