"""`gmemd-source` as a process, and files for it to send."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, Self

from support.polling import PATIENCE
from support.vmm import PAGE

COUNT = 64  # pages of a small guest


def guest_content(rng: random.Random, pages: int) -> bytes:
    """Pages of noise, and here and there one of zeros."""
    return b"".join(bytes(PAGE) if rng.random() < 0.1 else rng.randbytes(PAGE) for _ in range(pages))


class Result(NamedTuple):
    """How a gmemd-source ended: exit code, what `--json` told ({} without), stderr."""

    code: int
    told: dict[str, Any]
    errors: str


class SourceProcess:
    """A gmemd-source that sends to a port of this host. `what` is "--file" or "--vmm" with its path."""

    def __init__(
        self,
        port: int,
        migration: str,
        *what: str | Path,
        options: tuple[str, ...] = (),
        prefix: tuple[str, ...] = (),
    ) -> None:
        """`prefix`: a command that runs another."""
        command = [*prefix, sys.executable, "-m", "gmemd.source_cli", f"127.0.0.1:{port}", "--migration", migration]
        self.process = subprocess.Popen(
            [*command, *map(str, what), "--json", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def result(self) -> Result:
        out, errors = self.process.communicate(timeout=PATIENCE)
        return Result(self.process.returncode, json.loads(out) if out else {}, errors)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()
        for stream in (self.process.stdout, self.process.stderr):
            if stream:
                stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def memory_file(content: bytes) -> int:
    """A memfd that a gmemd-source can open as /proc/PID/fd/N."""
    fd = os.memfd_create("source")
    os.write(fd, content)
    return fd
