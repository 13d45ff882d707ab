"""gmemd, measured: daemon, sender and guest as processes of their own, over loopback TCP."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gmemd.status import ask
from gmemd_tools.bench.content import warm
from gmemd_tools.bench.link import Link
from gmemd_tools.bench.programs import PATIENCE, ProgramError, Result, program

BIN = Path(sys.executable).parent
MOST_USED = 1 << 30  # by a guest of ours, however large it is
LOOK_S = 0.5  # between two looks at a sender, while its guest says nothing


class Daemon:
    """A running `gmemd serve`, and what it takes to move guests to it."""

    def __init__(self, folder: Path, settings: str, link: Link | None) -> None:
        self.folder = folder
        self.host = link.destination if link else "127.0.0.1"
        self._link = link
        self._socket = folder / "gmemd.sock"
        self._status = folder / "status.sock"
        self._migrations = 0
        config = folder / "gmemd.toml"
        config.write_text(
            f'[daemon]\nsocket = "{self._socket}"\nstatus_socket = "{self._status}"\n'
            f'[network]\nlisten = "{self.host}:0"\n{settings}'
        )
        self._log = (folder / "daemon.log").open("w")
        command = [*(link.at_destination if link else ()), str(BIN / "gmemd"), "serve", "--config", str(config)]
        self.process = subprocess.Popen(command, stderr=self._log)
        self._port = self._wait_for_port()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE)
        self._log.close()

    def move(
        self, content: Path, memory: int, *guest: object, source: tuple[object, ...] = (), whole: bool = True
    ) -> Result:
        """Moves a guest of `memory` bytes that touches as `guest` says; what guest, sender and daemon have to tell. Not
        `whole`: until the guest has made its touches, and no further."""
        warm(min(memory, MOST_USED))
        self._migrations += 1
        name = f"bench-{self._migrations}"
        toucher = _Guest(self._socket, name, memory, *guest)
        inside = self._link.at_source if self._link else ()
        sender = _Sender(
            self.folder / f"{name}.log", f"{self.host}:{self._port}", name, content, *source, inside=inside
        )
        try:
            toucher.expect("ready", sender)
            before = cpu_seconds(self.process.pid), cpu_seconds(sender.pid)
            result: Result = {"source_memory": own_memory(sender.pid), "ready_us": toucher.ready_us}
            result["guest"] = toucher.expect("guest", sender)
            if whole:
                result["source"], cpu = sender.finish()
                result["source_cpu_s"] = cpu - before[1]
            result["daemon_cpu_s"] = cpu_seconds(self.process.pid) - before[0]
            result["daemon"] = self._of(name)
            result["daemon_memory"] = own_memory(self.process.pid)
        finally:
            sender.close()
            toucher.close()
        return result

    def _of(self, name: str) -> dict[str, Any]:
        status = ask(self._status, {"command": "status"})
        return next(dict(m) for m in status["migrations"] + status["finished"] if m["migration"] == name)

    def _wait_for_port(self) -> int:
        """The kernel chooses the port, so that benchmarks never meet; the daemon says which."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            for line in Path(self._log.name).read_text().splitlines():
                if "sources come to" in line:
                    return int(line.rpartition(":")[2])
            time.sleep(0.01)
        raise ProgramError(f"gmemd serve does not come up: {Path(self._log.name).read_text()}")


@contextmanager
def daemon(folder: Path, settings: str = "", link: Link | None = None) -> Iterator[Daemon]:
    """A daemon with its sockets in `folder`; `settings` are more of its configuration. Its sources come over `link`."""
    folder.mkdir(exist_ok=True)
    running = Daemon(folder, settings, link)
    try:
        yield running
    finally:
        running.close()


class _Guest:
    """guest.c, by its events."""

    def __init__(self, socket: Path, name: str, memory: int, *arguments: object) -> None:
        words = [program("guest"), "--gmemd", socket, "--migration", name, "--memory", memory, *arguments]
        self._process = subprocess.Popen(
            list(map(str, words)), bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.ready_us = 0.0
        self._ended = False
        self._sent = self.expect("sent")["at_ns"]

    def expect(self, name: str, sender: "_Sender | None" = None) -> Result:
        """Reads events up to the one with this name. It may never come if its sender fails."""
        assert self._process.stdout
        while line := self._line(sender):
            event: Result = json.loads(line)
            if event["event"] == "error":
                raise ProgramError(f"guest: {event['message']}")
            if event["event"] == "ready":
                self.ready_us = (event["at_ns"] - self._sent) / 1e3
            self._ended = event["event"] == "guest"
            if event["event"] == name:
                return event
        raise ProgramError(f"guest: ended before {name!r}")

    def _line(self, sender: "_Sender | None") -> bytes:
        assert self._process.stdout
        while not select.select([self._process.stdout], [], [], LOOK_S)[0]:
            if sender:
                sender.check()
        return self._process.stdout.readline()

    def close(self) -> None:
        if not self._ended:
            self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate(timeout=PATIENCE)


class _Sender:
    """gmemd-source, with what it used of a CPU. What it has to say, in `log`, is of interest if it fails."""

    def __init__(
        self, log: Path, address: str, name: str, content: Path, *arguments: object, inside: Sequence[str] = ()
    ) -> None:
        words = [*inside, BIN / "gmemd-source", address, "--migration", name, "--file", content, "--json"]
        command = [*map(str, words), *map(str, arguments)]
        with log.open("w") as stderr:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr)
        self._log = log
        self.pid = self._process.pid
        self._ended = False

    def finish(self) -> tuple[Result, float]:
        """Waits for its end; its own summary, and seconds of CPU."""
        assert self._process.stdout
        text = self._process.stdout.read()
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        self.check()
        summary: Result = json.loads(text)
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self._ended = True
        return summary, usage.ru_utime + usage.ru_stime

    def check(self) -> None:
        """Raises if it has failed."""
        end = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if end and end.si_status:
            raise ProgramError(f"gmemd-source: status {end.si_status}: {self._log.read_text()}")

    def close(self) -> None:
        if not self._ended:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(PATIENCE)
        assert self._process.stdout
        self._process.stdout.close()


def cpu_seconds(pid: int) -> float:
    """CPU time of a process with all its threads, those that have ended too."""
    return time.clock_gettime(~pid << 3 | 2)  # CPUCLOCK_SCHED, as clock_getcpuclockid(3) makes it


def own_memory(pid: int) -> int:
    """Bytes of memory of its own that a process has now: not what it shares, such as guest memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields["RssAnon"].split()[0]) << 10
