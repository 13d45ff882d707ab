"""What is kept of a migration for the daemon's successor, under which names, and how it is put together again."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gmemd.notify import Notifier

log = logging.getLogger(__name__)

STATE, VMM, BLOB, DESCRIPTOR = "state", "vmm", "blob", "fd"
# How it ended, for a source that has not heard it yet.
ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Kept:
    """One migration as it was kept: the state memfd, the VMM's connection, the VMM's descriptors in their first order,
    and the VMM's own state if the VMM has not had it yet."""

    migration: str
    state: int
    vmm: int
    fds: list[int]
    blob: int | None


class Keeper:
    """Keeps one migration's descriptors with whoever outlives us: the service manager, or a holder of ours."""

    def __init__(self, store: Notifier, migration: str) -> None:
        self._store = store
        self._migration = migration
        self._names: list[str] = []

    def keep(self, what: str, fd: int) -> None:
        """Hands over one descriptor."""
        self._store.store(f"{what}.{self._migration}", [fd])
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
        self._store.remove(f"{what}.{self._migration}")

    def forget_guest(self) -> None:
        """Has everything let go but how it ended: as long as it is kept, the guest's memory is."""
        while self._names:
            self.forget(self._names.pop())

    def adopt(self, kept: Kept) -> None:
        """These are with the keeper already."""
        self._names += [*(f"{DESCRIPTOR}{index}" for index in range(len(kept.fds))), VMM, STATE]
        if kept.blob is not None:
            self._names.append(BLOB)


def take_ends(stored: dict[str, list[int]]) -> list[bytes]:
    """Takes out of what came back how migrations ended."""
    ends = []
    for name in [name for name in stored if name.partition(".")[0] == ENDED]:
        for fd in stored.pop(name):
            ends.append(os.pread(fd, os.fstat(fd).st_size, 0))
            os.close(fd)
    return ends


def sort_out(stored: Mapping[str, list[int]], store: Notifier) -> list[Kept]:
    """Puts together what came back. What belongs to nothing is let go, with a word in the log."""
    parts: dict[str, dict[str, int]] = {}
    for name, fds in stored.items():
        what, _, migration = name.partition(".")
        if not migration or len(fds) != 1:
            _let_go(name, fds, store, "no name of ours")
        else:
            parts.setdefault(migration, {})[what] = fds[0]
    return [kept for migration, found in parts.items() if (kept := _put_together(migration, found, store))]


def _put_together(migration: str, parts: dict[str, int], store: Notifier) -> Kept | None:
    fds: list[int] = []
    rest = dict(parts)
    while (fd := rest.pop(f"{DESCRIPTOR}{len(fds)}", None)) is not None:
        fds.append(fd)
    state, vmm, blob = (rest.pop(name, None) for name in (STATE, VMM, BLOB))
    if state is None or vmm is None or not fds or rest:
        # A daemon that died while it kept or forgot: nothing ran on that memory yet, or nothing was missing any more.
        for what, fd in parts.items():
            _let_go(f"{what}.{migration}", [fd], store, "parts of it are missing")
        return None
    return Kept(migration, state, vmm, fds, blob)


def _let_go(name: str, fds: Sequence[int], store: Notifier, why: str) -> None:
    log.warning("kept descriptor %s is let go: %s", name, why)
    for fd in fds:
        os.close(fd)
    store.remove(name)
