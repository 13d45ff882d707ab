"""Tells the service manager how we are, and has it, or a holder of ours, keep descriptors for the next start
(sd_notify(3)).

Every message is one datagram. Where NOTIFY_SOCKET is not set, nobody listens and nothing is sent.
"""

import logging
import os
import socket
from collections import deque
from collections.abc import MutableMapping, Sequence

from gmemd.errors import reason

log = logging.getLogger(__name__)

MAX_NAME = 255  # bytes of FDNAME; systemd takes a longer one for none at all
# The socket's queue is short and PID 1 may be busy, but our event loop must not stand still for long.
SEND_TIMEOUT = 1.0


class Notifier:
    """The way to the service manager. A message that cannot be sent is logged once, no more."""

    def __init__(self, address: str) -> None:
        """`address` as in NOTIFY_SOCKET: a path, or an abstract name after an `@`; "" is nobody."""
        self.address = "\0" + address[1:] if address.startswith("@") else address
        self._unheard: deque[str] = deque()  # names to be removed

    def ready(self) -> None:
        self.send("READY=1")

    def status(self, text: str) -> bool:
        """Shown by `systemctl status`. False: not now; the next will be newer."""
        return self.send("STATUS=" + " ".join(text.splitlines()), timeout=0.0)

    def stopping(self) -> None:
        self.send("STOPPING=1")

    def alive(self) -> None:
        """To be sent at least every `watchdog_interval`."""
        self.send("WATCHDOG=1", timeout=0.0)

    def store(self, name: str, fds: Sequence[int]) -> bool:
        """Has descriptors kept under a name over a crash or restart. False: they were not handed over."""
        self.catch_up()
        if checked(name) in self._unheard:  # two of one name are of no use to a successor
            return False
        # Without FDPOLL=0 systemd drops, without a word, what polls as an error or a hang-up.
        return self.send("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=fds)

    def remove(self, name: str) -> None:
        """Has all descriptors of that name closed: until then, they keep a guest's memory alive. What cannot be said
        now is said by `catch_up`, in the same order: a successor must not find the rest of what is half removed."""
        waiting = bool(self._unheard)
        if self.address:
            self._unheard.append(checked(name))
        if not waiting:
            self.catch_up(SEND_TIMEOUT)

    def catch_up(self, timeout: float = 0.0) -> None:
        """To be called once in a while: says again what could not be said."""
        while self._unheard and self.send("FDSTOREREMOVE=1", f"FDNAME={self._unheard[0]}", timeout=timeout):
            self._unheard.popleft()

    def send(self, *lines: str, fds: Sequence[int] = (), timeout: float = SEND_TIMEOUT) -> bool:
        if not self.address:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
                channel.settimeout(timeout)
                channel.connect(self.address)
                socket.send_fds(channel, ["\n".join(lines).encode()], fds)
        except BlockingIOError:  # what is not worth waiting for
            return False
        except OSError as error:
            what = lines[0].partition("=")[0]
            name = self.address.replace("\0", "@", 1)
            log.warning("%s is not told %s: %s", name, what, reason(error), extra={"once": (name, what)})
            return False
        return True


def from_environment(environ: MutableMapping[str, str] = os.environ) -> Notifier:
    """Takes the variable out of the environment, so that no child speaks in our name."""
    return Notifier(environ.pop("NOTIFY_SOCKET", ""))


def watchdog_interval(environ: MutableMapping[str, str] = os.environ) -> float | None:
    """The seconds within which the service manager wants to hear `alive`; None if it does not care."""
    usec, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", str(os.getpid()))
    return int(usec) / 1e6 if usec.isdecimal() and int(usec) and pid == str(os.getpid()) else None


def checked(name: str) -> str:
    if not 0 < len(name) <= MAX_NAME or ":" in name or not (name.isascii() and name.isprintable()):
        raise ValueError(f"{name!r} cannot name a descriptor: 1 to {MAX_NAME} ASCII characters, no colon")
    return name
