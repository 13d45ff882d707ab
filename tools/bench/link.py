"""A link with a rate: two network namespaces, a veth pair between them, and a token bucket at the source's end."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

SOURCE, DESTINATION, PREFIX = "198.18.13.1", "198.18.13.2", 30  # of the range for benchmarks, RFC 2544
BURST_BYTES = 256 << 10  # what passes at once: four of the largest segments
QUEUE_MS = 5  # how long the link keeps what comes too fast, before it drops


@dataclass(frozen=True, slots=True)
class Link:
    """How to run a command at either end, and where the destination listens."""

    at_source: tuple[str, ...]
    at_destination: tuple[str, ...]
    destination: str = DESTINATION


def missing() -> str | None:
    """Why there can be no link here, if so."""
    if os.geteuid():
        return "network namespaces need root"
    if not (shutil.which("tc") and shutil.which("ip")):
        return "ip and tc are not installed: apt-get install iproute2"
    return None


@contextmanager
def shaped(mbit_per_s: int) -> Iterator[Link]:
    """A link that lets so much through from source to destination; the way back is free."""
    names = [f"gmb{os.getpid()}{end}" for end in "sd"]
    with ExitStack() as stack:
        for name in names:
            _run("ip", "netns", "add", name)
            stack.callback(_run, "ip", "netns", "del", name)
        _run("ip", "link", "add", "gmb", "netns", names[0], "type", "veth", "peer", "name", "gmb", "netns", names[1])
        for name, address in zip(names, (SOURCE, DESTINATION), strict=True):
            _run("ip", "-n", name, "address", "add", f"{address}/{PREFIX}", "dev", "gmb")
            _run("ip", "-n", name, "link", "set", "gmb", "up")
        _run("tc", "-n", names[0], "qdisc", "add", "dev", "gmb", "root", "tbf", "rate", f"{mbit_per_s}mbit",
             "burst", str(BURST_BYTES), "latency", f"{QUEUE_MS}ms")  # fmt: skip
        source, destination = (("ip", "netns", "exec", name) for name in names)
        yield Link(source, destination)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
