"""Tells the service manager that we are alive, as long as faults are answered.

That the event loop runs proves nothing about the thread that answers faults. So that thread is asked for a turn each
time, and only if it has made one since is the service manager told.
"""

import logging
import time
from typing import Protocol

import trio

from gmemd.notify import Notifier

log = logging.getLogger(__name__)

# Looks in the time that the service manager allows: one may come late, and one may fall between two turns.
LOOKS = 4


class Turning(Protocol):
    """What makes turns when asked: the pager."""

    @property
    def turns(self) -> int: ...

    def turn(self) -> None: ...


async def watch(pager: Turning, notifier: Notifier, interval: float) -> None:
    """Runs until cancelled."""
    turns, moved = pager.turns, time.monotonic()
    while True:
        pager.turn()
        await trio.sleep(interval / LOOKS)
        now = time.monotonic()
        if pager.turns != turns:
            turns, moved = pager.turns, now
            notifier.alive()
        else:
            silent = now - moved
            log.error("the pager has not moved for %.1f s", silent, extra={"once": __name__, "every": interval})
