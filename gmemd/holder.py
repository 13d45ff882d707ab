"""A process that does nothing but keep descriptors: what systemd's store is for a service, for a daemon without
systemd.

It takes the same datagrams as the service manager (FDSTORE=1, FDSTOREREMOVE=1, FDNAME=), on a socket at a path, and
one more: FDLIST=1 comes with a socket, over which it hands everything back, and which stays open as long as the daemon
lives. With ALONE=1 it does so only when no other daemon lives: two would both serve the guests, and undo their writes.
It ends when there is neither a daemon nor anything to keep.
"""

import contextlib
import os
import resource
import select
import selectors
import socket
import subprocess
import sys
from pathlib import Path

from gmemd.errors import UnavailableError, reason
from gmemd.keeping import ENDED
from gmemd.native import keep_secret

NOFILE = resource.RLIMIT_NOFILE
MAX_DATAGRAM = 4096
MAX_DESCRIPTORS = 253  # the kernel's limit of one message
END = b"FDEND=1"
TAKEN = b"FDTAKEN=1"
# A host short of CPUs or memory takes long to start a Python, and who starts us again would have to wait as well.
ANSWER_SECONDS = 60.0
# How a migration ended is kept for a source that may still ask; without a daemon, only so long.
LINGER_SECONDS = 60.0


class Holder:
    """Keeps descriptors by name."""

    def __init__(self, inbox: socket.socket) -> None:
        self._inbox = inbox
        self._kept: dict[str, list[int]] = {}
        self._daemons: set[socket.socket] = set()
        self._selector = selectors.DefaultSelector()
        self._selector.register(inbox, selectors.EVENT_READ)

    def run(self) -> None:
        """Until nobody needs us."""
        heard = False
        while not heard or self._kept or self._daemons:
            ready = self._selector.select(None if self._needed else LINGER_SECONDS)
            if not ready:
                break
            for key, _ in ready:
                if key.fileobj is self._inbox:
                    heard = True
                    self._take()
                else:
                    self._hang_up(key.fileobj)

    @property
    def _needed(self) -> bool:
        """Whether there is a daemon, or a guest."""
        return bool(self._daemons) or any(not name.startswith(f"{ENDED}.") for name in self._kept)

    def _take(self) -> None:
        data, fds, flags, _ = socket.recv_fds(self._inbox, MAX_DATAGRAM, MAX_DESCRIPTORS)
        lines = data.decode(errors="replace").splitlines()
        if flags & socket.MSG_CTRUNC:
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(f"gmemd-holder: {_lost(len(fds))} of {lines}", file=sys.stderr)
        fields = dict(line.partition("=")[::2] for line in lines)
        name = fields.get("FDNAME", "")
        if "FDSTORE" in fields and name:
            self._kept.setdefault(name, []).extend(fds)
        elif "FDLIST" in fields and fds:
            daemon = socket.socket(fileno=fds.pop(0))
            _close(fds)
            if "ALONE" in fields and not all(map(_has_ended, self._daemons)):
                with daemon, contextlib.suppress(OSError):
                    daemon.send(TAKEN)
            else:
                self._give_back(daemon)
        else:
            _close(fds)
            if "FDSTOREREMOVE" in fields:
                _close(self._kept.pop(name, []))

    def _give_back(self, daemon: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for name, fds in self._kept.items():
                for fd in fds:
                    socket.send_fds(daemon, [f"FDNAME={name}".encode()], [fd])
            daemon.send(END)
        self._daemons.add(daemon)
        self._selector.register(daemon, selectors.EVENT_READ)

    def _hang_up(self, daemon: object) -> None:
        assert isinstance(daemon, socket.socket)
        self._selector.unregister(daemon)
        self._daemons.discard(daemon)
        daemon.close()


def _has_ended(daemon: socket.socket) -> bool:
    """One that lives says nothing more; the hang-up of another may not have been looked at yet."""
    hangs_up = select.poll()  # its number may be too large for select()
    hangs_up.register(daemon, select.POLLIN)
    return bool(hangs_up.poll(0))


def _lost(came: int) -> str:
    return f"only {came} descriptors came, others were lost: no more than {resource.getrlimit(NOFILE)[0]} may be open"


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def take_back(path: Path, *, alone: bool = False) -> tuple[socket.socket, dict[str, list[int]]]:
    """What the holder at `path` keeps, by name, and the socket that tells it that we live. Starts a holder if there is
    none. `alone`: as its daemon, of which there is one at a time."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        try:
            try:
                out.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                _start(path)
                out.connect(str(path))
            socket.send_fds(out, [b"FDLIST=1\nALONE=1" if alone else b"FDLIST=1"], [theirs.fileno()])
        except OSError as error:
            ours.close()
            raise UnavailableError(f"{path}: no holder of descriptors: {reason(error)}") from None
    ours.settimeout(ANSWER_SECONDS)
    kept: dict[str, list[int]] = {}
    try:
        _receive(ours, kept)
    except OSError as error:
        _let_go(ours, kept)
        raise UnavailableError(f"{path}: the holder of descriptors does not answer: {reason(error)}") from None
    except UnavailableError as error:
        _let_go(ours, kept)
        raise UnavailableError(f"{path}: {error}") from None
    return ours, kept


def _receive(holder: socket.socket, kept: dict[str, list[int]]) -> None:
    while True:
        data, fds, flags, _ = socket.recv_fds(holder, MAX_DATAGRAM, MAX_DESCRIPTORS)
        if flags & socket.MSG_CTRUNC:
            raise UnavailableError(f"{_lost(len(fds))}; the holder keeps them all: ulimit -n")
        if data == TAKEN:
            raise UnavailableError("the daemon that has this --fd-store still lives")
        if not data or data == END:
            return
        kept.setdefault(data.decode().partition("=")[2], []).extend(fds)


def _let_go(holder: socket.socket, kept: dict[str, list[int]]) -> None:
    holder.close()
    for fds in kept.values():
        _close(fds)


def _start(path: Path) -> None:
    """Starts a holder that outlives us. Its socket is there before it is, so nobody has to wait."""
    if path.is_socket():
        path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        old_umask = os.umask(0o177)
        try:
            inbox.bind(str(path))
        finally:
            os.umask(old_umask)
        subprocess.Popen(
            [sys.executable, "-m", "gmemd.holder", str(inbox.fileno()), str(path)],
            pass_fds=[inbox.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )


def main() -> None:
    """The process: a descriptor of its socket, and the path of that."""
    fd, path = sys.argv[1:]
    keep_secret()
    resource.setrlimit(NOFILE, (resource.getrlimit(NOFILE)[1],) * 2)
    with socket.socket(fileno=int(fd)) as inbox:
        Holder(inbox).run()
        Path(path).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
