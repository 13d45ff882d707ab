"""How fast the background may go, by how long is waited for pages: over a made-up line, in made-up time."""

from typing import Any

import pytest
from native_inside import ffi, inside

TURN_NS = 11_000_000
LATE_US = 50_000
LEAST = 8 << 20
GIGABIT = 120_000_000


class Line:
    """The background sends as much as it may and the line carries; somebody waits four times a turn."""

    def __init__(self, carries: int) -> None:
        self.carries = carries
        self.sent = 0
        self.now = 10**9
        self.native: Any = ffi.new("struct gm_giveway *")
        inside.gm_giveway_queue(self.native, 5000)

    @property
    def rate(self) -> int:
        return int(inside.gm_giveway_rate(self.native, self.now))

    def turns(self, count: int, waited_us: int, wanted: bool = True) -> None:
        for _ in range(4 * count):
            self.now += TURN_NS // 4
            self.sent += wanted * min(self.rate or self.carries, self.carries) * (TURN_NS // 4) // 10**9
            inside.gm_giveway_wait(self.native, self.now, waited_us, 100, self.sent)


def test_a_share_of_the_line_is_the_backgrounds() -> None:
    """However long and for whatever reason is waited: each wait ends only when its page has come."""
    line = Line(GIGABIT)
    line.turns(1000, LATE_US)
    assert line.rate == pytest.approx(GIGABIT / 4, rel=0.05)


def test_a_line_that_gets_slower() -> None:
    line = Line(10 * GIGABIT)
    line.turns(100, LATE_US)
    line.carries = GIGABIT
    line.turns(100, LATE_US)
    assert line.rate < GIGABIT / 2


def test_a_line_with_nothing_to_carry_is_not_a_slow_one() -> None:
    line = Line(GIGABIT)
    line.turns(10, LATE_US)
    line.turns(2, LATE_US, wanted=False)
    line.turns(10, LATE_US)
    assert line.rate > GIGABIT / 6


def test_the_slowest_of_lines() -> None:
    line = Line(1_000_000)
    line.turns(100, LATE_US)
    assert line.rate == LEAST


def test_faster_when_waits_are_short_again_and_free_when_nobody_waits() -> None:
    line = Line(GIGABIT)
    line.turns(100, LATE_US)
    held = line.rate
    line.turns(20, 10)
    assert line.rate == 0 or line.rate > 4 * held
    line.turns(100, LATE_US)
    assert line.rate
    line.now += 200_000_000
    assert line.rate == 0


def test_a_wait_that_is_noted_while_the_rate_is_asked_for() -> None:
    """By another thread, whose clock was read later."""
    line = Line(GIGABIT)
    line.turns(100, LATE_US)
    held = line.rate
    line.now -= 1000
    assert line.rate == held
