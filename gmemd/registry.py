"""The migrations of a daemon by name, and those who wait for one."""

import json
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import trio

from gmemd.callers import ROOT
from gmemd.errors import DataError, HandoffError
from gmemd.migrate.destination import IncomingMigration, Phase

# Migrations that are remembered after their end, for an operator who asks how it went.
FINISHED = 16


@dataclass(frozen=True, slots=True)
class Finished:
    """A migration that has ended. `told` is what there was to say of it."""

    name: str
    phase: str
    epoch: int
    tokens: list[str]  # of its latest session and of the one before, in hex, as far as this daemon saw them
    pages: int
    told: dict[str, Any]
    owner: int = ROOT  # the VMM's user
    at: float = field(default_factory=time.monotonic)

    def record(self) -> bytes:
        """For a successor."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def read(cls, record: bytes) -> Self:
        """DataError if it is none."""
        try:
            return cls(**json.loads(record))
        except (ValueError, TypeError) as error:
            raise DataError(f"not how a migration ended: {error}") from None

    def was_with(self, epoch: int, token: bytes) -> bool:
        """Whether a source that says so was its last one; it may have missed the last welcome."""
        known = token.hex() in self.tokens or (epoch == self.epoch and not self.tokens)
        return 0 < epoch <= self.epoch and known

    @property
    def complete(self) -> bool:
        return self.phase == Phase.COMPLETE.value

    @property
    def age(self) -> float:
        """Seconds since its end."""
        return time.monotonic() - self.at


@dataclass(slots=True)
class Unusable:
    """A migration that was kept for this daemon, which cannot take it over."""

    name: str
    owner: int
    why: str
    kept: list[str]
    given_up: trio.Event = field(default_factory=trio.Event)


class Registry:
    """Knows every migration from its hand-off until its VMM has let go of it."""

    def __init__(self, limit: int, limit_of_user: int) -> None:
        self.limit = limit
        self.limit_of_user = limit_of_user
        self.listen = ""  # where sources come to
        self.ended: Counter[str] = Counter()  # by phase, those before us that are remembered included
        self.finished: deque[Finished] = deque(maxlen=FINISHED)
        self.unusable: dict[str, Unusable] = {}
        self.waiting: dict[str, str] = {}  # sources whose VMM has not come: by address, what they name
        self._owners: dict[str, int] = {}
        self._migrations: dict[str, IncomingMigration] = {}
        self._arrivals = trio.Condition()

    def __iter__(self) -> Iterator[IncomingMigration]:
        return iter(list(self._migrations.values()))

    def remember(self, ended: Finished) -> Finished | None:
        """Keeps in mind how one ended; returns the one that is forgotten for it."""
        oldest = self.finished[0] if len(self.finished) == FINISHED else None
        self.finished.append(ended)
        self.ended[ended.phase] += 1
        return oldest

    def find_finished(self, name: str) -> Finished | None:
        """The latest of that name that has ended."""
        return next((ended for ended in reversed(self.finished) if ended.name == name), None)

    def get(self, name: str) -> IncomingMigration | None:
        return self._migrations.get(name)

    @contextmanager
    def reserved(self, name: str, owner: int, *, kept: bool = False) -> Iterator[None]:
        """Takes a name and a place before the work of setting up begins. One that was kept has its place already,
        whatever the limits are by now."""
        if name in self._owners:
            raise HandoffError(f"migration {name}: another VMM receives it already: sent by the VMM")
        if not kept:
            self._check_limits(name, owner)
        self._owners[name] = owner
        try:
            yield
        finally:
            del self._owners[name]
            self._migrations.pop(name, None)

    def _check_limits(self, name: str, owner: int) -> None:
        if len(self._owners) >= self.limit:
            raise HandoffError(f"migration {name}: this daemon has {self.limit} migrations already, its limit")
        if list(self._owners.values()).count(owner) >= self.limit_of_user:
            raise HandoffError(f"migration {name}: user {owner} has {self.limit_of_user} migrations already, its limit")

    async def add(self, migration: IncomingMigration) -> None:
        """A source may have it from now on."""
        self._migrations[migration.name] = migration
        async with self._arrivals:
            self._arrivals.notify_all()

    async def arrival(self, name: str) -> IncomingMigration:
        """The migration, once its VMM has come."""
        async with self._arrivals:
            while name not in self._migrations:
                await self._arrivals.wait()
            return self._migrations[name]
