"""Bitmaps of pages against sets of numbers, and claims by many threads at once."""

import random
import threading
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from native_inside import ffi, inside

if TYPE_CHECKING:
    from native_races import Races

pytest_plugins = ["native_races"]

BITS = 4 * 64
MOST = 64  # pages of a claim
ALL = (1 << 64) - 1

indices = st.integers(0, BITS - 1)
# Borders of words are where bitmaps go wrong.
starts = st.one_of(st.sampled_from([0, 1, 62, 63, 64, 65, 127, 128, 191, 192]), indices)


def words(bits: int = BITS) -> Any:
    return ffi.new("gm_word[]", (bits + 63) // 64)


def ones(mask: int, first: int = 0) -> set[int]:
    """The bits of a mask, as numbers counted from `first`."""
    return {first + bit for bit in range(64) if mask >> bit & 1}


def mask_of(found: set[int], first: int) -> int:
    return sum(1 << (index - first) for index in found)


class AgainstSet(RuleBasedStateMachine):
    """Every operation on a bitmap and on a set, which must go on agreeing."""

    def __init__(self) -> None:
        super().__init__()
        self.bits = words()
        self.model: set[int] = set()

    @rule(first=starts, count=st.integers(1, MOST))
    def claim(self, first: int, count: int) -> None:
        wanted = set(range(first, min(first + count, BITS)))
        got = inside.gm_bitmap_claim(self.bits, first, len(wanted))
        assert ones(got, first) == wanted - self.model
        self.model |= wanted

    @rule(first=starts, mask=st.integers(0, ALL))
    def give_back(self, first: int, mask: int) -> None:
        mask &= (1 << min(64, BITS - first)) - 1
        inside.gm_bitmap_give_back(self.bits, first, mask)
        self.model -= ones(mask, first)

    @rule(first=starts, count=st.integers(0, BITS))
    def set(self, first: int, count: int) -> None:
        wanted = set(range(first, min(first + count, BITS)))
        assert inside.gm_bitmap_set(self.bits, first, len(wanted)) == len(wanted - self.model)
        self.model |= wanted

    @rule(start=starts, end=st.integers(0, BITS), value=st.booleans())
    def find(self, start: int, end: int, value: bool) -> None:
        hits = (index for index in range(start, end) if (index in self.model) is value)
        assert inside.gm_bitmap_find(self.bits, start, end, value) == next(hits, end)

    @invariant()
    def same(self) -> None:
        assert {i for i in range(BITS) if inside.gm_bitmap_test(self.bits, i)} == self.model
        assert inside.gm_bitmap_count(self.bits, BITS) == len(self.model)


TestAgainstSet = AgainstSet.TestCase


@given(mask=st.integers(0, ALL))
def test_runs_of_a_mask(mask: int) -> None:
    """Walking the runs as the callers do covers each bit once; runs touch neither each other nor clear bits."""
    at = ffi.new("unsigned *")
    runs = []
    while run := inside.gm_mask_run(mask, at):
        runs.append((at[0], run))
        at[0] += run
    assert mask_of({bit for start, run in runs for bit in range(start, start + run)}, 0) == mask
    assert all(start + run < following for (start, run), (following, _) in pairwise(runs))


def test_each_page_is_claimed_once(rng: random.Random) -> None:
    """Threads claim overlapping ranges and give a part back now and then: no page has two owners at a time."""
    bits, pages, threads = words(1 << 12), 1 << 12, 4
    owned = [0] * pages  # by how many just now; a change between claim and give-back would be seen
    problems: list[int] = []
    begin = threading.Barrier(threads)

    def work(seed: int) -> None:
        own = random.Random(seed)
        begin.wait()
        for _ in range(3000):
            count = own.randint(1, MOST)
            first = own.randrange(pages - count)
            got = ones(inside.gm_bitmap_claim(bits, first, count), first)
            problems.extend(index for index in got if owned[index])
            for index in got:
                owned[index] += 1
            back = {index for index in got if own.random() < 0.7}
            for index in back:
                owned[index] -= 1
            inside.gm_bitmap_give_back(bits, first, mask_of(back, first))

    workers = [threading.Thread(target=work, args=(rng.random(),)) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not problems
    assert inside.gm_bitmap_count(bits, pages) == sum(owned)
    assert set(owned) == {0, 1}


def test_two_claims_at_the_same_time(races: "Races") -> None:
    """Within nanoseconds of each other, over borders of words: each page goes to one of the two."""
    pages = 1 << 20
    bits = words(pages)
    assert races.claims(bits, pages) == inside.gm_bitmap_count(bits, pages)


def test_all_claims_together_are_all_pages() -> None:
    """Threads that claim the same pages in the same order get each page between them, once."""
    pages, threads = 1 << 16, 4
    bits = words(pages)
    begin = threading.Barrier(threads)
    got: list[int] = []

    def work() -> None:
        begin.wait()
        mine = 0
        for first in range(0, pages, 48):
            count = min(48, pages - first)
            mine += inside.gm_bitmap_claim(bits, first, count).bit_count()
        got.append(mine)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sum(got) == pages
    assert inside.gm_bitmap_count(bits, pages) == pages
