"""Who is at the other end of a UNIX socket, as the kernel tells it, and what that user may have."""

import os
import pwd
import socket
import struct
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol, Self

from gmemd.config import Config

UCRED = struct.Struct("3i")
ROOT = 0


class HasOptions(Protocol):
    """A socket, of the standard library or of trio."""

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Caller:
    """The process that has connected, as it was then."""

    pid: int
    uid: int

    @classmethod
    def of(cls, sock: HasOptions) -> Self:
        pid, uid, _ = UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
        return cls(pid, uid)

    @property
    def is_operator(self) -> bool:
        """Root, and the daemon's own user, may see and do everything."""
        return self.uid in (ROOT, os.geteuid())

    def owns(self, owner: int) -> bool:
        """Whether a migration whose VMM is that user's is this caller's business."""
        return self.is_operator or self.uid == owner

    def __str__(self) -> str:
        try:
            return f"user {pwd.getpwuid(self.uid).pw_name}"
        except KeyError:
            return f"user {self.uid}"


class VmmRules:
    """Which user's VMM may receive which migrations, by patterns of their names. Without any rule, every user's may
    receive every one."""

    def __init__(self, config: Config) -> None:
        self._users: dict[str, set[int]] = {}
        for pattern, users in config.vmms.items():
            try:
                self._users[pattern] = {_uid(user) for user in users}
            except LookupError as error:
                raise config.wrong("vmms", pattern, f"{error.args[0]}: make it, or name another") from None

    def allow(self, caller: Caller, migration: str) -> bool:
        matching = (users for pattern, users in self._users.items() if fnmatchcase(migration, pattern))
        return not self._users or caller.is_operator or any(caller.uid in users for users in matching)


def _uid(user: str) -> int:
    """Raises LookupError."""
    try:
        return int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise LookupError(f"no user {user} on this host") from None
