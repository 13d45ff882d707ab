"""What a run does to its migration, and when: drawn from a seed, so that it can be drawn again."""

import random
from dataclasses import dataclass

SINGLE = ("link-cut", "link-stall", "half-open", "daemon-kill", "daemon-restart", "source-kill")
TWO = "two-at-once"
KINDS = (*SINGLE, TWO)
# These would meet the same process, and one of them no process at all.
APART = {frozenset(("daemon-kill", "daemon-restart"))}

# Hello, welcome, lanes, bitmap, state: as much as passes before the first page.
OPENING_BYTES = 2500
OPENING_SHARE, END_SHARE = 0.3, 0.15
# Two at once are at the same byte, or so near that the first is not over.
NEAR_BYTES = 256 * 1024
STALL_SECONDS = (0.1, 2.0)  # from unnoticed to found dead at both ends


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: what, after how many bytes between the two hosts, and for how long if it is one that ends."""

    kind: str
    byte: int
    seconds: float = 0.0


def draw(kind: str, size: int, rng: random.Random) -> list[Fault]:
    """The faults of one run, in a conversation that will be about `size` bytes."""
    byte = _byte(size, rng)
    if kind != TWO:
        return [_fault(kind, byte, rng)]
    pairs = [(a, b) for a in SINGLE for b in SINGLE if a != b and frozenset((a, b)) not in APART]
    first, second = rng.choice(pairs)
    later = byte + rng.choice((0, rng.randrange(NEAR_BYTES)))
    return [_fault(first, byte, rng), _fault(second, later, rng)]


def _fault(kind: str, byte: int, rng: random.Random) -> Fault:
    return Fault(kind, byte, round(rng.uniform(*STALL_SECONDS), 3) if kind == "link-stall" else 0.0)


def _byte(size: int, rng: random.Random) -> int:
    """Anywhere, and more often where there is most to go wrong."""
    which = rng.random()
    if which < OPENING_SHARE:
        return rng.randrange(1, OPENING_BYTES)
    if which < OPENING_SHARE + END_SHARE:
        return rng.randrange(int(0.97 * size), size)
    return rng.randrange(1, size)
