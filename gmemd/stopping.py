"""Being told to stop. The first signal is heard; whoever repeats it does not cut the clean-up short."""

import logging
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import trio

from gmemd.errors import SIGNALLED

log = logging.getLogger(__name__)

T = TypeVar("T")

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(slots=True)
class Told:
    """The signal that told us, if one did."""

    by: signal.Signals | None = None


@contextmanager
def until_told() -> Iterator[Told]:
    """Cancels what is within at the first of STOPPING. From then on they do nothing: with trio's own receiver, they
    would have their usual effect again as soon as it is closed, on a process that is about to end by itself."""
    told, scope, loop = Told(), trio.CancelScope(), trio.lowlevel.current_trio_token()

    def tell(number: int) -> None:
        if told.by is None:
            told.by = signal.Signals(number)
            for each in before:
                signal.signal(each, signal.SIG_IGN)
            log.info("%s: stopping", told.by.name)
            scope.cancel()

    heeded = [each for each in STOPPING if signal.getsignal(each) is not signal.SIG_IGN]  # nohup has one ignored
    before = {each: signal.signal(each, lambda number, _: loop.run_sync_soon(tell, number)) for each in heeded}
    try:
        with scope:
            yield told
    finally:
        if told.by is None:
            for each, handler in before.items():
                signal.signal(each, handler)


def run(main: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """As trio.run(). When a signal has ended it, what follows is the end of the process, with the exit code of that."""

    async def heeding() -> T:
        with until_told() as told:
            return await main(*arguments)
        assert told.by
        raise SystemExit(SIGNALLED + told.by)

    return trio.run(heeding)
