"""The latency histogram: buckets without gaps, and percentiles within its precision of the exact ones."""

import random
import threading
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_inside import inside, pointer

from gmemd.native import ffi, lib

PRECISION = 1 / 16  # a bucket's width, as a part of its lower bound
TOP = lib.gm_histogram_bound(lib.GM_BUCKETS - 1)
PARTS = [0, 1, 250_000, 500_000, 900_000, 990_000, 999_000, 999_999, 1_000_000]


class Histogram:
    """A histogram of its own, which Python otherwise has only as a part of a destination."""

    def __init__(self) -> None:
        self.memory = ffi.new("uint64_t[]", lib.GM_BUCKETS + 2)
        self.native: Any = ffi.cast("struct gm_histogram *", self.memory)
        self.inside: Any = pointer("struct gm_histogram *", self.memory)

    def record(self, *values: int) -> None:
        for value in values:
            inside.gm_histogram_record(self.inside, value)

    def counts(self) -> list[int]:
        out = ffi.new("uint64_t[]", lib.GM_BUCKETS)
        lib.gm_histogram_counts(self.native, out)
        return list(out)

    def percentiles(self, parts: list[int]) -> list[int]:
        out = ffi.new("uint64_t[]", len(parts))
        lib.gm_histogram_percentiles(self.native, parts, out, len(parts))
        return list(out)


def test_bounds_rise_and_are_close() -> None:
    bounds = [lib.gm_histogram_bound(bucket) for bucket in range(lib.GM_BUCKETS)]
    assert bounds[:17] == list(range(17)), "exact below 16 ns"
    assert all(low < high for low, high in pairwise(bounds))
    assert all(high - low <= max(1, low * PRECISION) for low, high in pairwise(bounds))
    assert TOP > 15 * 60 * 10**9, "a quarter of an hour still has its own bucket"


@given(value=st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 2**12), st.integers(TOP - 2, TOP + 2)))
def test_a_value_is_counted_in_the_bucket_around_it(value: int) -> None:
    histogram = Histogram()
    histogram.record(value)
    bucket = histogram.counts().index(1)
    assert lib.gm_histogram_bound(bucket) <= value
    assert bucket + 1 == lib.GM_BUCKETS or value < lib.gm_histogram_bound(bucket + 1)
    assert lib.gm_histogram_count(histogram.native) == 1
    assert lib.gm_histogram_max_ns(histogram.native) == value
    assert lib.gm_histogram_sum_ns(histogram.native) == value


def draw(rng: random.Random, shape: str) -> int:
    """A latency in ns."""
    if shape == "even":
        return rng.randrange(10**9)
    if shape == "log":
        return int(2 ** rng.uniform(0, 39))
    return rng.choice([30_000, 42_000, 2_000_000]) if shape == "few" else 123_456


@pytest.mark.parametrize("shape", ["even", "log", "few", "one"])
def test_percentiles_are_close_to_the_exact_ones(rng: random.Random, shape: str) -> None:
    values = sorted(draw(rng, shape) for _ in range(5000))
    histogram = Histogram()
    histogram.record(*rng.sample(values, len(values)))
    for part, found in zip(PARTS, histogram.percentiles(PARTS), strict=True):
        exact = values[(len(values) - 1) * part // 1_000_000]
        assert abs(found - exact) <= max(1, exact * PRECISION), f"{part} millionths"
    assert histogram.percentiles([1_000_000])[0] <= values[-1] == lib.gm_histogram_max_ns(histogram.native)
    assert lib.gm_histogram_sum_ns(histogram.native) == sum(values)


def test_an_empty_histogram_says_zero() -> None:
    assert Histogram().percentiles(PARTS) == [0] * len(PARTS)


def test_threads_lose_nothing() -> None:
    """Recorded by many threads at once: every value is counted, and the largest is known."""
    histogram, threads, each = Histogram(), 4, 20_000
    begin = threading.Barrier(threads)

    def work(base: int) -> None:
        begin.wait()
        for value in range(base, base + each):
            inside.gm_histogram_record(histogram.inside, value)

    workers = [threading.Thread(target=work, args=(each * i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    total = threads * each
    assert lib.gm_histogram_count(histogram.native) == total
    assert lib.gm_histogram_sum_ns(histogram.native) == total * (total - 1) // 2
    assert lib.gm_histogram_max_ns(histogram.native) == total - 1
