"""What a bad network is like, read from text: docs/network.md."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gmemd.config import parse_size
from gmemd.errors import UsageError

UNITS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
# What strikes, and the number that it may be given: seconds of a stall, bytes that are spoilt or lost.
DEFAULTS: dict[str, float] = {
    "cut": 0,
    "truncate": 0,
    "half-open": 0,
    "stall": 2.0,
    "corrupt": 1,
    "lose": 100,
    "daemon-kill": 0,
    "source-kill": 0,
}
SIZED = ("corrupt", "lose")


@dataclass(frozen=True, slots=True)
class When:
    """One of these. `after`: seconds since the first connection; `byte`: so many have passed; `every`: again and again,
    with so many seconds in between on average; `file`: each time that it appears."""

    after: float | None = None
    byte: int | None = None
    every: float | None = None
    file: Path | None = None


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something that strikes."""

    kind: str
    amount: float
    when: When


@dataclass(frozen=True, slots=True)
class Conditions:
    """One way's latency, jitter on top of it, and how long a new connection may be held back, in seconds; bytes/s of
    each way, 0 for no limit; the share of packets that are lost, which only the kernel can do."""

    latency: float = 0.0
    jitter: float = 0.0
    rate: int = 0
    reorder: float = 0.0
    loss: float = 0.0
    kernel: bool = False
    seed: int = 1
    troubles: tuple[Trouble, ...] = field(default=())

    @property
    def spoils(self) -> bool:
        """Whether it says what nobody said: a peer may then refuse what it hears, and end."""
        return any(trouble.kind in SIZED for trouble in self.troubles)

    @property
    def shaped(self) -> bool:
        return bool(self.latency or self.jitter or self.rate)


def parse(text: str, seed: int = 1) -> Conditions:
    """Reads KEY=VALUE and TROUBLE[=AMOUNT]@WHEN, with commas between them. Raises UsageError."""
    values: dict[str, Any] = {"seed": seed}
    troubles = []
    for part in filter(None, text.split(",")):
        try:
            key, value = _item(part)
        except ValueError as error:
            raise UsageError(f"--network {part}: {error}") from None
        if isinstance(value, Trouble):
            troubles.append(value)
        else:
            values[key] = value
    found = Conditions(**values, troubles=tuple(troubles))
    if found.loss and not found.kernel:
        raise UsageError("--network loss: packets are lost by the kernel only: add by=kernel")
    if found.kernel and (found.reorder or found.troubles):
        raise UsageError("--network by=kernel: takes latency, jitter, rate and loss")
    return found


def _item(part: str) -> tuple[str, Any]:
    what, at, when = part.partition("@")
    key, equals, value = what.partition("=")
    if key in DEFAULTS:
        if not at:
            raise ValueError("say when: @3s, @64M, @~2s (every two seconds on average) or @/trigger/file")
        return key, Trouble(key, _amount(key, value) if equals else DEFAULTS[key], _when(when))
    if at or not equals or key not in READERS:
        raise ValueError(f"there are {', '.join(f'{name}=' for name in READERS)} and {', '.join(DEFAULTS)}")
    return key if key != "by" else "kernel", READERS[key](value)


def _amount(kind: str, text: str) -> float:
    if not DEFAULTS[kind]:
        raise ValueError("takes no amount")
    return parse_size(text) if kind in SIZED else seconds(text)


def _when(text: str) -> When:
    if text.startswith("/"):
        return When(file=Path(text))
    if text.startswith("~"):
        return When(every=seconds(text[1:]))
    if text.endswith("s"):
        return When(after=seconds(text))
    return When(byte=parse_size(text))


def seconds(text: str) -> float:
    """As 5ms, 0.2s or 300us."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?)(us|µs|ms|s)", text)
    if not match:
        raise ValueError(f"{text!r} is no time: as 5ms, 0.2s, 300us")
    return float(match[1]) * UNITS[match[2]]


def _share(text: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?)%", text)
    if not match or float(match[1]) > 100:
        raise ValueError(f"{text!r} is no share: as 0.5%")
    return float(match[1]) / 100


def _by(text: str) -> bool:
    if text not in ("relay", "kernel"):
        raise ValueError(f"{text!r}: relay or kernel")
    return text == "kernel"


def _whole(text: str) -> int:
    return int(text)


READERS: dict[str, Callable[[str], Any]] = {
    "latency": seconds,
    "jitter": seconds,
    "rate": parse_size,
    "reorder": seconds,
    "loss": _share,
    "by": _by,
    "seed": _whole,
}
