"""A network namespace for the source, behind a pair of veth devices that `tc` makes slow."""

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from gmemd.errors import UnavailableError
from gmemd_tools.network.conditions import Conditions

# 198.18.0.0/15 is for measurements of networks: nothing else uses it.
FIRST_ADDRESS = (198 << 24) + (18 << 16)
NETWORKS = 1 << 15  # of four addresses each
TBF_BURST_SECONDS = 0.002
SMALLEST_BURST = 64 * 1024  # one segment that the sender has not cut up yet
TBF_QUEUE = "50ms"
UNKNOWN = "qdisc kind is unknown"  # tc, where the kernel lacks it and has no module of that name


@dataclass(frozen=True, slots=True)
class Namespace:
    """`prefix` runs a command in it; `host` is our address, as seen from there."""

    prefix: tuple[str, ...]
    host: str


@asynccontextmanager
async def open_namespace(conditions: Conditions) -> AsyncIterator[Namespace]:
    """Raises UnavailableError where this takes more rights, or a kernel with more in it."""
    name, ours, theirs = f"gmemd-{os.getpid()}", f"gm{os.getpid()}a", f"gm{os.getpid()}b"
    network = FIRST_ADDRESS + 4 * (os.getpid() % NETWORKS)
    inside = ("ip", "netns", "exec", name)
    await _run("ip", "netns", "add", name)
    try:
        await _run("ip", "link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
        for prefix, device, address in (((), ours, network + 1), (inside, theirs, network + 2)):
            await _run(*prefix, "ip", "addr", "add", f"{_dotted(address)}/30", "dev", device)
            await _run(*prefix, "ip", "link", "set", device, "up")
            if discipline := _discipline(conditions):
                await slow_down(prefix, device, discipline)
        yield Namespace(inside, _dotted(network + 1))
    finally:
        with trio.CancelScope(shield=True):
            await _run("ip", "netns", "del", name)


async def slow_down(prefix: Sequence[str], device: str, discipline: Sequence[str]) -> None:
    """Gives a device a queue of tc's; UnavailableError names what the kernel lacks."""
    try:
        await _run(*prefix, "tc", "qdisc", "add", "dev", device, "root", *discipline)
    except UnavailableError as error:
        if UNKNOWN not in str(error):
            raise
        kind = discipline[0]
        advice = "leave out by=kernel, and a relay has latency and jitter" if kind == "netem" else "leave out by=kernel"
        raise UnavailableError(
            f"--network by=kernel: this kernel has no {kind} (CONFIG_NET_SCH_{kind.upper()}): {advice}"
        ) from None


def _discipline(conditions: Conditions) -> Sequence[str]:
    """What tc is told. netem does everything; tbf only rates, on more kernels."""
    bits = f"{conditions.rate * 8}bit"
    if conditions.latency or conditions.jitter or conditions.loss:
        delay = conditions.latency + conditions.jitter / 2
        return (
            *("netem", "limit", "100000"),
            *("delay", f"{delay * 1e6:.0f}us", f"{conditions.jitter / 2 * 1e6:.0f}us"),
            *(("loss", f"{conditions.loss * 100}%") if conditions.loss else ()),
            *(("rate", bits) if conditions.rate else ()),
        )
    if conditions.rate:
        burst = max(SMALLEST_BURST, int(conditions.rate * TBF_BURST_SECONDS))
        return ("tbf", "rate", bits, "burst", str(burst), "latency", TBF_QUEUE)
    return ()


def _dotted(address: int) -> str:
    return ".".join(str(address >> shift & 0xFF) for shift in (24, 16, 8, 0))


async def _run(*command: str) -> None:
    try:
        ended = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    except FileNotFoundError:
        raise UnavailableError(f"--network by=kernel: no {command[0]} here: install iproute2") from None
    if ended.returncode:
        said = ended.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise UnavailableError(f"--network by=kernel: {' '.join(command)}: {said[0]}")
