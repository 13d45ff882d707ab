"""`gmemd serve` as a process, with sockets in a folder of its own, and what can be seen of it from outside."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from gmemd import status
from support.polling import PATIENCE, eventually

PREFIX = "GMEMD_TEST_DAEMON_PREFIX"
CONFIG = """
[daemon]
socket = "{folder}/gmemd.sock"
status_socket = "{folder}/status.sock"
{sockets}
[network]
listen = "{listen}"
"""


# Becomes a daemon, with the descriptors whose numbers come first as 3, 4, …. It heeds signals that who runs us may not.
HAND_IN = """
import fcntl, os, signal, sys
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
at = sys.argv.index("--config")
for place, fd in enumerate([fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in sys.argv[1:at]], 3):
    os.dup2(fd, place)
    os.close(fd)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(at - 1)}
os.execv(sys.executable, [sys.executable, "-m", "gmemd.cli", "serve", *sys.argv[at:]])
"""


class Manager(threading.Thread):
    """A service manager that reads all that it is told; descriptors that come with it are let go."""

    def __init__(self, path: Path) -> None:
        super().__init__(name="manager")
        self.path = path
        self.told: list[str] = []
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        path.chmod(0o666)  # for a daemon of another user
        self.start()

    def run(self) -> None:
        while data := self._socket.recv(4096):
            self.told += data.decode().splitlines()

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.sendto(b"", str(self.path))
        self.join()
        self._socket.close()


class DaemonProcess:
    """A daemon that has said READY=1. `settings` go behind CONFIG, whose last table is [network]."""

    def __init__(
        self,
        folder: Path,
        settings: str = "",
        *,
        handed: Mapping[str, int] | None = None,
        sockets: str = "",
        listen: str = "127.0.0.1:0",
        prefix: Sequence[str] | None = None,
    ) -> None:
        """`handed`: listening sockets by name, as a service manager hands them in; `sockets`: more keys of [daemon];
        `prefix`: a command that runs another, by default that in the environment, for what watches all daemons."""
        handed = handed or {}
        prefix = shlex.split(os.environ.get(PREFIX, "")) if prefix is None else prefix
        self.folder = folder
        self.socket = folder / "gmemd.sock"
        self.status_socket = folder / "status.sock"
        self.config = folder / "gmemd.toml"
        self.config.write_text(CONFIG.format(folder=folder, sockets=sockets, listen=listen) + settings)
        self.log = folder / "daemon.log"
        self.manager = Manager(folder / "notify")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-c", HAND_IN, *map(str, handed.values()), "--config", str(self.config)],
                env=os.environ | {"NOTIFY_SOCKET": str(self.manager.path), "LISTEN_FDNAMES": ":".join(handed)},
                stdin=subprocess.DEVNULL,
                stderr=log,
                pass_fds=list(handed.values()),
            )
        try:
            eventually(lambda: "READY=1" in self.manager.told or self._ended())
            assert self.process.poll() is None, self.log.read_text()
        except BaseException:
            self.close()
            raise
        self.port = int(self.status()["listen"].rpartition(":")[2])

    def _ended(self) -> bool:
        return self.process.poll() is not None

    def status(self) -> dict[str, Any]:
        return status.ask(self.status_socket, {"command": "status"})

    def migration(self, name: str) -> dict[str, Any]:
        """What it tells of one migration that has not ended."""
        found = [m for m in self.status()["migrations"] if m["migration"] == name]
        assert found, f"there is no migration {name}"
        return dict(found[0])

    def ended(self, name: str) -> dict[str, Any]:
        """What it tells of one that has, once it has."""

        def look() -> dict[str, Any] | None:
            return next((m for m in self.status()["finished"] if m["migration"] == name), None)

        found = eventually(look)
        assert found
        return found

    def abandon(self, name: str) -> dict[str, Any]:
        return status.ask(self.status_socket, {"command": "abandon", "migration": name, "force": True})

    def descriptors(self) -> Counter[str]:
        """How many it has of each kind, by names without what differs from one to the next."""
        folder = Path(f"/proc/{self.process.pid}/fd")
        found = []
        for entry in folder.iterdir():
            try:
                found.append(os.readlink(entry).partition(":[")[0].removesuffix(" (deleted)"))
            except FileNotFoundError:
                continue
        return Counter(found)

    def memory_kib(self) -> dict[str, int]:
        """Its VmRSS, RssAnon, RssShmem, …, in KiB."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}

    def cpu_seconds(self) -> float:
        """What it has used of the processor, all threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def tell_to_stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """Its exit code."""
        self.tell_to_stop()
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        """Whatever state it is in."""
        self.process.kill()
        self.process.wait()
        self.manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
