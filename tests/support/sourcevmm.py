"""A VMM's end of a hand-off at the source."""

import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from support.polling import PATIENCE
from support.source import memory_file
from support.vmm import PAGE

MAX_MESSAGE = 128 * 1024


class SourceVmm:
    """Listens for gmemd-source, with a guest of one region for each content."""

    def __init__(self, path: Path, *contents: bytes) -> None:
        self.path = path
        self.files = [memory_file(content) for content in contents]
        self.sizes = [len(content) for content in contents]
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(PATIENCE)
        self._connection: socket.socket | None = None

    @property
    def regions(self) -> list[dict[str, int]]:
        gpas = [sum(self.sizes[:index]) for index in range(len(self.sizes))]
        return [
            {"file": index, "offset": 0, "size": size, "page_size": PAGE, "gpa": gpa}
            for index, (size, gpa) in enumerate(zip(self.sizes, gpas, strict=True))
        ]

    def accept(self) -> dict[str, Any]:
        """Takes a gmemd-source in; its first message."""
        self.hang_up()
        self._connection = self._listener.accept()[0]
        self._connection.settimeout(PATIENCE)
        return self.receive()

    def hand_over(self, migration: str) -> None:
        assert self.accept() == {"gmemd": 1, "send": migration}
        self.answer({"regions": self.regions}, self.files)

    def pause(self, state: bytes | None = None) -> None:
        """Answers "pause"."""
        assert self.receive() == {"pause": True}
        if state is None:
            self.answer({"paused": True})
            return
        fd = memory_file(state)
        self.answer({"paused": True, "state": 0}, [fd])
        os.close(fd)

    def receive(self) -> dict[str, Any]:
        """The next message of gmemd-source; {} when it has hung up."""
        assert self._connection
        data = self._connection.recv(MAX_MESSAGE)
        return dict(json.loads(data)) if data else {}

    def answer(self, message: dict[str, Any] | bytes, fds: Sequence[int] = ()) -> None:
        assert self._connection
        data = message if isinstance(message, bytes) else json.dumps(message).encode()
        socket.send_fds(self._connection, [data], fds)

    def hang_up(self) -> None:
        if self._connection:
            self._connection.close()
            self._connection = None

    def close(self) -> None:
        self.hang_up()
        self._listener.close()
        for fd in self.files:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
