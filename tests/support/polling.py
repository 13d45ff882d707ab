"""Waiting for what other processes do."""

import time
from collections.abc import Callable
from typing import TypeVar

from support.pace import SLOWER

T = TypeVar("T")

PATIENCE = 20.0 * SLOWER  # seconds; what is waited for here takes milliseconds
STEP = 0.005


def eventually(look: Callable[[], T], seconds: float = PATIENCE) -> T:
    """What `look` returns, as soon as that is something; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, f"not within {seconds:g} s: {look}"
        time.sleep(STEP)
    return found
