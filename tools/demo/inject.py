"""What a demo does to itself: faults, each at a share of the memory that has arrived."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio

from gmemd.errors import UsageError

KINDS = ("link-cut", "link-stall", "daemon-kill", "daemon-restart", "source-kill")
DEFAULT_PERCENT = 50
# With a fault to come, the background takes this long, so that the fault meets a migration and not its end.
SECONDS = 4
LOOK_SECONDS = 0.01


@dataclass(frozen=True, slots=True, order=True)
class Injection:
    """One fault."""

    percent: int
    kind: str


def parse(texts: Sequence[str]) -> list[Injection]:
    """Reads FAULT[@PERCENT], in the order in which they will come."""
    injections = []
    for text in texts:
        kind, _, percent = text.partition("@")
        if kind not in KINDS:
            raise UsageError(f"--inject {text}: no such fault; there are {', '.join(KINDS)}")
        if percent and not (percent.isascii() and percent.isdigit() and int(percent) < 100):
            raise UsageError(f"--inject {text}: a percentage from 0 to 99")
        injections.append(Injection(int(percent or DEFAULT_PERCENT), kind))
    return sorted(injections)


async def inject(
    injections: Sequence[Injection],
    arrived: Callable[[], Awaitable[float]],
    actions: dict[str, Callable[[], Awaitable[None]]],
) -> None:
    """Does each when `arrived` (per cent) says that it is time."""
    for injection in injections:
        while await arrived() < injection.percent:  # noqa: ASYNC110 (the daemon is asked, it does not tell)
            await trio.sleep(LOOK_SECONDS)
        await actions[injection.kind]()
