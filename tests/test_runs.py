"""Coded runs of pages against a plain set of page numbers."""

from itertools import chain, groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmemd.errors import ProtocolError
from gmemd.migrate import runs

PAGES = 2**40


def runs_of(pages: set[int]) -> list[runs.Run]:
    """The runs of a set, by counting."""
    found = []
    for _, group in groupby(enumerate(sorted(pages)), lambda pair: pair[1] - pair[0]):
        members = [page for _, page in group]
        found.append((members[0], len(members)))
    return found


def pages_of(some: list[runs.Run]) -> list[int]:
    return [page for first, count in some for page in range(first, first + count)]


@given(st.sets(st.integers(0, 400)))
def test_round_trip_against_a_set(pages: set[int]) -> None:
    region = max(pages, default=0) + 1
    chunks = list(runs.encode(runs_of(pages)))
    assert bool(chunks) == bool(pages)
    back = [run for start, code in chunks for run in runs.decode_untrusted(start, code, region)]
    assert pages_of(back) == sorted(pages)


GAPS_AND_LENGTHS = st.lists(st.tuples(st.integers(0, 2**30), st.integers(1, 2**30)), max_size=60)


@given(GAPS_AND_LENGTHS)
def test_round_trip_of_large_regions(parts: list[tuple[int, int]]) -> None:
    at, given_runs = 0, []
    for gap, length in parts:
        given_runs.append((at + gap, length))
        at += gap + length
    back = [run for start, code in runs.encode(given_runs) for run in runs.decode_untrusted(start, code, PAGES)]
    assert back == given_runs


def test_chunks_are_bounded_and_stand_alone() -> None:
    """The worst bitmap there is: every other page."""
    given_runs = [(page, 1) for page in range(0, 200_000, 2)]
    chunks = list(runs.encode(iter(given_runs)))
    assert len(chunks) == 7
    assert all(len(code) <= runs.CHUNK_BYTES for _, code in chunks)
    some = [runs.decode_untrusted(start, code, 200_000) for start, code in reversed(chunks)]
    assert list(chain(*reversed(some))) == given_runs


def test_the_largest_numbers_fit_a_chunk() -> None:
    chunks = list(runs.encode([(2**40 - 2, 1)]))
    assert chunks == [(0, b"\xfe\xff\xff\xff\xff\x1f\x01")]


@pytest.mark.parametrize(
    ("start", "code", "error"),
    [
        (0, b"\x00", "a gap without a run"),
        (0, b"\x00\x01\x05", "a gap without a run"),
        (0, b"\x03\x00", "a run of no pages"),
        (0, b"\x00\x80", "cut off in the middle of a number"),
        (0, b"\x80" * 6 + b"\x01\x01", "a number of more than 6 bytes"),
        (0, b"\x00\x65", "page 100 outside a region of 100 pages"),
        (0, b"\x64\x01", "page 100 outside a region of 100 pages"),
        (100, b"\x00\x01", "page 100 outside a region of 100 pages"),
        (0, b"\x00\x63\x01\x01", "page 100 outside a region of 100 pages"),
        (2**40, b"\xff\xff\xff\xff\xff\x7f\xff\xff\xff\xff\xff\x7f", "outside a region of 100 pages"),
    ],
)
def test_hostile_code(start: int, code: bytes, error: str) -> None:
    with pytest.raises(ProtocolError, match=error):
        runs.decode_untrusted(start, code, 100)


@given(st.integers(0, 300), st.binary(max_size=40), st.integers(1, 300))
def test_any_code_gives_runs_within_the_region_or_an_error_of_ours(start: int, code: bytes, region: int) -> None:
    try:
        some = runs.decode_untrusted(start, code, region)
    except ProtocolError:
        return
    at = start
    for first, length in some:
        assert length > 0
        assert at <= first
        at = first + length
    assert at <= max(start, region)
