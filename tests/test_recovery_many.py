"""Many migrations at once in one daemon, and one after another: none is in another's way, and nothing is left over.

`make test` has a few; `make test-timing` as many as a host may have, with what it costs the others.
"""

import os
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from support.proxy import Fault, Proxy, Way
from support.recovery import Host, Sender, Vmm, content, open_host, order

from gmemd.daemon import PAGER_THREAD

TIMING = "GMEMD_TIMING" in os.environ
AT_A_TIME = trio.CapacityLimiter(16)  # hand-offs
ROOM = trio.CapacityLimiter(128)  # guests' threads
pytestmark = pytest.mark.deadline(240 if TIMING else 30)


@dataclass
class Guest:
    """One migration: its VMM, its source, and what happens to it."""

    name: str
    pages: int
    rng: random.Random
    trouble: str = ""
    told: dict[str, Any] | None = None

    async def live(self, host: Host) -> None:
        """The guest reads all its memory, and finds it right."""
        seed = self.rng.randrange(1 << 20)
        with Vmm(self.name, self.pages) as vmm, Sender(self.name, self.pages, host.plan.port, seed) as sender:
            async with AT_A_TIME:
                await vmm.hand_over(host.handoff)
            async with trio.open_nursery() as nursery:
                await self._read_all(host, nursery, vmm, sender, seed)

    async def _read_all(self, host: Host, nursery: trio.Nursery, vmm: Vmm, sender: Sender, seed: int) -> None:
        """Looks at the status once, before the last page: it is dear where there are many."""
        await TROUBLES[self.trouble](self, host, nursery, sender)
        assert (await vmm.hear())["ready"]
        for nth, page in enumerate(order(self.pages, self.rng), 1):
            if nth == self.pages:
                self.told = await host.told(self.name)
            assert await vmm.read(page, ROOM) == content(page, seed)
        while not (await vmm.hear()).get("done"):
            pass
        assert vmm.wrong(seed) == []
        nursery.cancel_scope.cancel()


async def nothing(_: Guest, __: Host, nursery: trio.Nursery, sender: Sender) -> None:
    nursery.start_soon(lambda: sender.run(background=False))


async def through(fault: Fault, nursery: trio.Nursery, host: Host, sender: Sender) -> Proxy:
    proxy = Proxy(host.plan.port, fault)
    await nursery.start(proxy.run)
    nursery.start_soon(lambda: sender.run(port=proxy.port, background=False))
    return proxy


async def cut(guest: Guest, host: Host, nursery: trio.Nursery, sender: Sender) -> None:
    lane = guest.rng.choice(("control", 0, 1))
    byte = guest.rng.randrange(60, guest.pages * 2048) if lane == 0 else guest.rng.randrange(60, 200)
    await through(Fault(lane, Way.UP, byte), nursery, host, sender)


async def stall(guest: Guest, host: Host, nursery: trio.Nursery, sender: Sender) -> None:
    await through(Fault(0, Way.UP, guest.rng.randrange(60, guest.pages * 2048), stall=True), nursery, host, sender)


async def replaced(guest: Guest, host: Host, nursery: trio.Nursery, sender: Sender) -> None:
    """The source goes without a word, and another comes."""

    async def first() -> None:
        with trio.CancelScope() as scope:
            fault = Fault(0, Way.UP, guest.rng.randrange(60, guest.pages * 2048), act=_call(scope.cancel))
            async with trio.open_nursery() as own:
                await through(fault, own, host, sender)
        await sender.run(background=False)

    nursery.start_soon(first)


def _call(act: Callable[[], None]) -> Callable[[], Awaitable[None]]:
    async def do() -> None:
        act()

    return do


TROUBLES: dict[str, Callable[[Guest, Host, trio.Nursery, Sender], Awaitable[None]]] = {
    "": nothing,
    "cut": cut,
    "stall": stall,
    "replaced": replaced,
}


async def live_at_once(host: Host, guests: Sequence[Guest]) -> None:
    async with trio.open_nursery() as nursery:
        for guest in guests:
            nursery.start_soon(guest.live, host)


def make(prefix: str, count: int, pages: int, rng: random.Random, *, trouble: bool) -> list[Guest]:
    """Every second one has some."""
    kinds = [kind for kind in TROUBLES if kind]
    return [
        Guest(f"{prefix}{n:02}", pages, random.Random(rng.random()), kinds[n // 2 % 3] if trouble and n % 2 else "")
        for n in range(count)
    ]


def latency(guests: Sequence[Guest]) -> tuple[float, float]:
    """The medians of the p50 and the p99 of those without trouble, in µs."""
    told = [guest.told["fault_latency_us"] for guest in guests if guest.told and not guest.trouble]
    return statistics.median(t["p50"] for t in told), statistics.median(t["p99"] for t in told)


async def test_half_of_them_in_trouble(tmp_path: Path, rng: random.Random) -> None:
    """The other half notices nothing; and those in trouble get all that is theirs, too."""
    async with open_host(tmp_path) as host:
        guests = make("m", 8, 64, rng, trouble=True)
        await live_at_once(host, guests)
        for guest in guests:
            assert guest.told
            lost = guest.trouble == "replaced"
            assert guest.told["recoveries"] >= lost, guest
            assert guest.trouble or guest.told["recoveries"] == 0


@pytest.mark.skipif(not TIMING, reason="latencies need a quiet host: `make test-timing`")
async def test_latency_beside_sixty_four_in_trouble(tmp_path: Path, rng: random.Random) -> None:
    async with open_host(tmp_path) as host:
        rounds = []
        for round_ in range(2):
            quiet = make(f"quiet{round_}-", 64, 64, rng, trouble=False)
            await live_at_once(host, quiet)
            troubled = make(f"half{round_}-", 64, 64, rng, trouble=True)
            await live_at_once(host, troubled)
            rounds.append((latency(quiet[::2]), latency(troubled)))
        for quiet_us, troubled_us in rounds:
            print(f"p50 {quiet_us[0]:.0f} -> {troubled_us[0]:.0f} µs, p99 {quiet_us[1]:.0f} -> {troubled_us[1]:.0f} µs")
        assert min(after[0] / before[0] for before, after in rounds) <= 2
        assert min(after[1] / before[1] for before, after in rounds) <= 2


# What is left over


def held(pid: int) -> dict[str, Any]:
    """Descriptors by kind, threads by name, mappings, and KiB of memory of a process."""
    proc = Path(f"/proc/{pid}")
    links = []
    for entry in (proc / "fd").iterdir():
        links.append(os.readlink(entry).partition(":[")[0])
    threads = [(task / "comm").read_text().strip() for task in (proc / "task").iterdir()]
    rss = next(line for line in (proc / "status").read_text().splitlines() if line.startswith("VmRSS"))
    return {
        "descriptors": Counter(links),
        "threads": Counter(thread for thread in threads if "Trio" not in thread and thread != PAGER_THREAD),
        "mappings": sum("memfd:" in line for line in (proc / "maps").read_text().splitlines()),
        "kib": int(rss.split()[1]),
    }


COUNTED = ("descriptors", "threads", "mappings")


async def at_rest(host: Host, before: dict[str, Any]) -> dict[str, Any]:
    """What is held as soon as that is no more than before, but for memory."""
    now: dict[str, Any] = {}
    with trio.move_on_after(5):
        while not now or any(now[what] > before[what] for what in COUNTED):
            await trio.sleep(0.01)
            now = held(host.pid)
    for what in COUNTED:
        assert now[what] <= before[what]
    return now


RUNS = int(os.environ.get("GMEMD_RUNS", "20"))
WARM_UP = max(10, RUNS // 4)  # the allocator takes a MiB in the first hundreds, and then no more
KIB_EACH = 4  # an end that is told in the status, and what the allocator does not give back


async def one(host: Host, name: str, pages: int, rng: random.Random) -> None:
    await Guest(name, pages, rng, rng.choice(("", "", "cut"))).live(host)


@pytest.mark.deadline(3600)
async def test_nothing_is_left_over(tmp_path: Path, rng: random.Random) -> None:
    """`GMEMD_RUNS=1000` for more."""
    async with open_host(tmp_path) as host:
        empty = held(host.pid)
        for n in range(WARM_UP):
            await one(host, f"first{n}", 16, rng)
        before = await at_rest(host, empty)
        for n in range(RUNS):
            await one(host, f"then{n}", 16, rng)
        after = await at_rest(host, empty)
        print(f"{RUNS} migrations: {after['kib'] - before['kib']} KiB more")
        assert after["kib"] - before["kib"] <= max(1024, KIB_EACH * RUNS // 10)
        assert (await host.ask(command="status"))["migrations"] == []


# A clean restart

STALL_SECONDS = 0.5


@asynccontextmanager
async def reading(vmm: Vmm, pages: int, rng: random.Random) -> AsyncIterator[list[float]]:
    """A guest that reads page after page; how long each took."""
    times: list[float] = []

    async def read() -> None:
        for page in order(pages, rng):
            begin = time.monotonic()
            assert await vmm.read(page, ROOM) == content(page)
            times.append(time.monotonic() - begin)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        yield times


@pytest.mark.skipif(not TIMING, reason="a stall is measured on a quiet host: `make test-timing`")
@pytest.mark.parametrize("how", ["restart", "kill"])
async def test_the_stall_of_another_daemon(how: str, tmp_path: Path, rng: random.Random) -> None:
    """As a guest sees it that wants another page all the time."""
    pages, rounds = 20_000, 5
    async with open_host(tmp_path) as host, host.migration("stalled", pages) as (vmm, sender):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: sender.run(background=False))
            assert (await vmm.hear())["ready"]
            stalls = []
            async with reading(vmm, pages, rng) as times:
                for _ in range(rounds):
                    seen = len(times) + 200
                    while len(times) < seen:
                        await trio.sleep(0.01)
                    await (host.cast.restart_daemon() if how == "restart" else host.cast.kill_daemon())
                    begin = len(times)
                    while len(times) == begin:
                        await trio.sleep(0.001)
                    stalls.append(max(times[seen:]))
                    times[:] = [0.0] * len(times)
            while not (await vmm.hear()).get("done"):
                pass
        print(f"{how}: the guest stood still for {', '.join(f'{1000 * stall:.0f}' for stall in stalls)} ms")
        assert statistics.median(stalls) < STALL_SECONDS
