"""QEMU's monitor protocol: commands out, answers and events in, one JSON object a line."""

import json
import socket
import time
from pathlib import Path
from typing import Any

from gmemd_tools.bench.programs import ProgramError

TIMEOUT = 30.0  # seconds for one answer or event
CONNECT_PAUSE = 0.01


class QmpError(ProgramError):
    """QEMU refused a command, hung up or said nothing."""


class Qmp:
    """One monitor. Events that come while an answer is waited for are kept for `event`."""

    def __init__(self, path: Path) -> None:
        self._socket = _connect(path)
        self._file = self._socket.makefile("rwb")
        self._events: list[dict[str, Any]] = []
        self._read()
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: object) -> Any:
        """Returns what QEMU answers."""
        self._file.write(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        self._file.flush()
        while "event" in (answer := self._read()):
            self._events.append(answer)
        if "error" in answer:
            raise QmpError(f"{name}: {answer['error']['desc']}")
        return answer["return"]

    def migration(self, *statuses: str) -> str:
        """Waits until the migration has one of these statuses (needs the capability `events`)."""
        while True:
            event = self._events.pop(0) if self._events else self._read()
            if event.get("event") == "MIGRATION" and event["data"]["status"] in statuses:
                return str(event["data"]["status"])

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def _read(self) -> dict[str, Any]:
        try:
            line = self._file.readline()
        except TimeoutError:
            raise QmpError(f"QEMU says nothing for {TIMEOUT:.0f} s") from None
        if not line:
            raise QmpError("QEMU hung up")
        return dict(json.loads(line))


def _connect(path: Path) -> socket.socket:
    deadline = time.monotonic() + TIMEOUT
    while True:
        monitor = socket.socket(socket.AF_UNIX)
        monitor.settimeout(TIMEOUT)
        try:
            monitor.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            monitor.close()
            if time.monotonic() > deadline:
                raise QmpError(f"{path}: QEMU does not come up") from None
            time.sleep(CONNECT_PAUSE)
        else:
            return monitor
