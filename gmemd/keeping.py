"""What is kept of a migration for the daemon's successor, under which names, and how it is put together again."""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gmemd.notify import Notifier

log = logging.getLogger(__name__)

STATE, VMM, BLOB, DIGESTS, DESCRIPTOR = "state", "vmm", "blob", "digests", "fd"
# How it ended, for a source that has not heard it yet.
ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Kept:
    """One migration as it was kept: the state memfd, the VMM's connection, the VMM's descriptors in their first order,
    the VMM's own state if the VMM has not had it yet, and digests of pages if there are any."""

    migration: str
    state: int
    vmm: int
    fds: list[int]
    blob: int | None
    digests: int | None

    @property
    def parts(self) -> dict[str, list[int]]:
        """Its descriptors by what they are."""
        parts = {f"{DESCRIPTOR}{index}": [fd] for index, fd in enumerate(self.fds)}
        some = {BLOB: self.blob, DIGESTS: self.digests}
        parts |= {what: [fd] for what, fd in some.items() if fd is not None}
        return parts | {VMM: [self.vmm], STATE: [self.state]}


@dataclass(frozen=True, slots=True)
class Stranded:
    """A migration that was kept and cannot be taken over: why, and its descriptors by what they are."""

    migration: str
    why: str
    parts: Mapping[str, Sequence[int]]

    def close(self) -> None:
        """Our own; the keeper has others."""
        for fds in self.parts.values():
            _close(fds)


class Keeper:
    """Keeps one migration's descriptors with whoever outlives us: the service manager, or a holder of ours."""

    def __init__(self, store: Notifier, migration: str) -> None:
        self._store = store
        self._migration = migration
        self._names: list[str] = []

    @property
    def kept(self) -> list[str]:
        """What of the guest is with the keeper."""
        return list(self._names)

    def keep(self, what: str, fd: int) -> None:
        """Hands over one descriptor, in place of one that is kept as the same."""
        if what in self._names:
            self.forget(what)
        if not self._store.store(f"{what}.{self._migration}", [fd]) and self._store.address:
            about = {"migration": self._migration, "once": (__name__, self._migration)}
            log.error("%s is not kept: the guest will not outlive a restart of the daemon", what, extra=about)
        if what != ENDED:
            self._names.append(what)

    def keep_all(self, state: int, vmm: int, fds: Sequence[int]) -> None:
        """Hands over what every migration needs, the state last: without it, nothing is adopted."""
        self.forget(ENDED)
        for index, fd in enumerate(fds):
            self.keep(f"{DESCRIPTOR}{index}", fd)
        self.keep(VMM, vmm)
        self.keep(STATE, state)

    def forget(self, what: str) -> None:
        """Has one let go."""
        if what in self._names:
            self._names.remove(what)
        self._store.remove(f"{what}.{self._migration}")

    def forget_guest(self) -> None:
        """Has everything let go but how it ended: as long as it is kept, the guest's memory is."""
        while self._names:
            self.forget(self._names[-1])

    def adopt(self, parts: Iterable[str]) -> None:
        """These are with the keeper already."""
        self._names += sorted(parts, key=lambda what: what == STATE)


def guests_are_kept(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the service manager has started us with guests that we, or a predecessor, had it keep."""
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    return environ.get("LISTEN_PID") == str(os.getpid()) and any(name.startswith(f"{STATE}.") for name in names)


def take_ends(stored: dict[str, list[int]]) -> list[bytes]:
    """Takes out of what came back how migrations ended."""
    ends = []
    for name in [name for name in stored if name.partition(".")[0] == ENDED]:
        for fd in stored.pop(name):
            ends.append(os.pread(fd, os.fstat(fd).st_size, 0))
            os.close(fd)
    return ends


def sort_out(stored: Mapping[str, list[int]], store: Notifier) -> tuple[list[Kept], list[Stranded]]:
    """Puts together what came back. What makes no sense stays with the keeper, as somebody's guest may wait for it."""
    migrations: dict[str, dict[str, list[int]]] = {}
    for name, fds in stored.items():
        what, _, migration = name.partition(".")
        if migration:
            migrations.setdefault(migration, {})[what] = fds
        else:
            log.warning("kept descriptor %s is left where it is: no name of ours", name)
            _close(fds)
    kept, stranded = [], []
    for migration, parts in migrations.items():
        if why := _wrong_with(parts):
            stranded.append(Stranded(migration, why, parts))
        elif STATE in parts:
            kept.append(_put_together(migration, parts))
        else:
            # A daemon that died within the hand-off, when nothing ran on that memory yet, or after the end.
            _let_go(migration, parts, store)
    return kept, stranded


def _wrong_with(parts: Mapping[str, Sequence[int]]) -> str | None:
    descriptors = [f"{DESCRIPTOR}{index}" for index in range(len(parts))]
    if unknown := sorted(set(parts) - {STATE, VMM, BLOB, DIGESTS, *descriptors}):
        return f"{', '.join(unknown)}: no part that this gmemd knows"
    if several := sorted(what for what, fds in parts.items() if len(fds) != 1 and what != BLOB):
        return f"{', '.join(several)}: kept more than once"
    held = sum(name in parts for name in descriptors)
    missing = sorted({VMM, *descriptors[: max(held, 1)]} - set(parts))
    if STATE in parts and missing:
        return f"{', '.join(missing)}: missing"
    return None


def _put_together(migration: str, parts: Mapping[str, list[int]]) -> Kept:
    fds = [parts[name][0] for index in range(len(parts)) if (name := f"{DESCRIPTOR}{index}") in parts]
    # A source sends the same state each time, so of several either will do.
    blob, *rest = parts.get(BLOB, [None])
    _close([fd for fd in rest if fd is not None])
    digests = parts.get(DIGESTS, [None])[0]
    return Kept(migration, parts[STATE][0], parts[VMM][0], fds, blob, digests)


def _let_go(migration: str, parts: Mapping[str, list[int]], store: Notifier) -> None:
    for what, fds in parts.items():
        log.warning("kept descriptor %s.%s is let go: it has no state", what, migration)
        _close(fds)
        store.remove(f"{what}.{migration}")


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
