"""A demo as asked for: the command lines of its processes."""

import argparse
import socket
import weakref
from dataclasses import dataclass, field
from pathlib import Path

from gmemd.config import quote
from gmemd_tools.demo.certificates import Party, certify

MIGRATION = "demo"


class Port:
    """A port of loopback to which a daemon can come back after it was killed, and that nobody else is given meanwhile:
    a socket is bound to it, and does not listen."""

    def __init__(self) -> None:
        held = socket.socket()
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        self.number = int(held.getsockname()[1])
        weakref.finalize(self, held.close)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the processes are told. `rate`: bytes/s of the background, 0 for no limit."""

    options: argparse.Namespace
    directory: Path
    rate: int = 0
    held: Port = field(default_factory=Port)

    @property
    def port(self) -> int:
        return self.held.number

    @property
    def status_socket(self) -> Path:
        return self.directory / "status.sock"

    def daemon(self) -> list[str]:
        return ["serve", f"--config={self._config()}", f"--fd-store={self.directory / 'store.sock'}"]

    def source(self) -> list[str]:
        o = self.options
        return ["source", f"--listen={self._vmm}", *self._machine(), f"--pattern={o.pattern}", f"--seed={o.seed}"]

    def destination(self) -> list[str]:
        own = ["--prefault"] if self.options.prefault else []
        return ["destination", f"--gmemd={self._handoff}", f"--migration={MIGRATION}", *self._machine(), *own]

    def sender(self, port: int) -> list[str]:
        return [
            f"127.0.0.1:{port}",
            f"--migration={MIGRATION}",
            f"--vmm={self._vmm}",
            f"--lanes={self.options.lanes}",
            f"--rate={self.rate}",
            "--json",
            *(["--verify"] if self.options.verify else []),
            *self._own_certificate(),
        ]

    @property
    def _handoff(self) -> Path:
        return self.directory / "gmemd.sock"

    @property
    def _vmm(self) -> Path:
        return self.directory / "source.sock"

    def _machine(self) -> list[str]:
        """What both VMMs must agree on."""
        o = self.options
        return [
            f"--memory={o.memory}",
            f"--vcpus={o.vcpus}",
            f"--regions={o.regions}",
            f"--backing={o.backing}",
            f"--guest={o.guest}",
            f"--slot={o.slot}",
            *(["--no-direct-map"] if o.no_direct_map else []),
        ]

    def _own_certificate(self) -> list[str]:
        if not self.options.tls:
            return []
        own = certify(self.directory, Party.SOURCE)
        return [f"--certificate={own.certificate}", f"--key={own.key}", f"--ca={own.ca}"]

    def _tls(self) -> str:
        if not self.options.tls:
            return ""
        own = certify(self.directory, Party.DESTINATION)
        files = "".join(f"{name} = {quote(getattr(own, name))}\n" for name in ("certificate", "key", "ca"))
        return f'[tls]\n{files}peers = ["{Party.SOURCE.value}"]'

    def _config(self) -> Path:
        path = self.directory / "gmemd.toml"
        trace = f"directory = {quote(self.options.trace.absolute())}" if self.options.trace else ""
        path.write_text(
            f"""[daemon]
socket = {quote(self._handoff)}
status_socket = {quote(self.status_socket)}
[network]
listen = "127.0.0.1:{self.port}"
{self._tls()}
[paging]
populate = "{self.options.populate}"
[trace]
{trace}
"""
        )
        return path
