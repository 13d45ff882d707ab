"""What both ends say of the pages after the end: all that came were compared, and a wrong one is named."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import trio
from support.proxy import Fault, Proxy, Way
from support.rawdestination import RawDestination
from support.rawsource import RawSource
from support.recovery import PAGE, Host, Sender, Vmm, content, open_host
from support.source import SourceProcess

from gmemd.errors import HandoffError, ProtocolError
from gmemd.migrate import wire
from gmemd.migrate.verify import Comparison
from gmemd.native import crc32c
from gmemd.native.memory import Memory, Region, Verdict

pytestmark = pytest.mark.deadline(30)

PAGES = 300
MIB = 1 << 20


async def done(vmm: Vmm) -> None:
    while not (await vmm.hear()).get("done"):
        pass


async def verdict_of(host: Host, name: str) -> dict[str, Any] | None:
    """What is told of it in the end."""
    while True:
        said = await host.ask(command="status")
        if not said["migrations"]:
            (told,) = [m for m in said["finished"] if m["migration"] == name]
            verdict: dict[str, Any] | None = told["verify"]
            return verdict
        await trio.sleep(0.01)  # a status is asked for, it is not told


async def send(host: Host, sender: Sender, *options: str) -> CompletedProcess[bytes]:
    """By the command."""
    command = [sys.executable, "-m", "gmemd.source_cli", f"127.0.0.1:{host.plan.port}", "--json", *options]
    file = f"--file=/proc/{os.getpid()}/fd/{sender.fd}"
    return await trio.run_process(
        [*command, f"--migration={sender.to.migration}", file], capture_stdout=True, capture_stderr=True, check=False
    )


async def asked_for(host: Host, vmm: Vmm, sender: Sender, *pages: int, verify: bool = True) -> None:
    """A source that sends these pages and is gone."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: sender.run(background=False, verify=verify))
        assert (await vmm.hear())["ready"]
        for page in pages:
            assert await vmm.read(page) == content(page)
        nursery.cancel_scope.cancel()
    await host.until(sender.to.migration, lanes=[])


async def test_every_page_is_compared(tmp_path: Path) -> None:
    """Content, zeros and holes."""
    async with open_host(tmp_path) as host, host.migration("m", PAGES) as (vmm, sender):
        os.pwrite(sender.fd, bytes(PAGE), 5 * PAGE)
        os.truncate(sender.fd, (PAGES - 20) * PAGE)
        os.truncate(sender.fd, PAGES * PAGE)
        ended = await send(host, sender, "--verify")
        await done(vmm)
        told = json.loads(ended.stdout)
        assert (ended.returncode, ended.stderr) == (0, b"")
        assert (told["ok"], told["verified"], told["left_out"], told["mismatches"]) == (True, PAGES, 0, 0)
        verdict = await verdict_of(host, "m")
        assert verdict == {"verified": PAGES, "left_out": 0, "mismatches": 0, "region": 0, "page": 0}
        assert f"{PAGES} pages compared, 0 left out, 0 differ" in host.log


async def test_nothing_is_kept_for_nobody(tmp_path: Path) -> None:
    async with open_host(tmp_path) as host, host.migration("m", PAGES) as (vmm, sender):
        await asked_for(host, vmm, sender, 3, verify=False)
        assert not {name for name in host.kept() if name.startswith("digests")}
        ended = await send(host, sender)
        assert not {"verified", "left_out", "mismatches"} & set(json.loads(ended.stdout))
        assert await verdict_of(host, "m") is None
        assert "compared" not in host.log


async def test_a_page_that_differs_is_named(tmp_path: Path) -> None:
    """It was changed at the source after it was sent. The guest that runs here is not harmed by our saying so."""
    async with open_host(tmp_path) as host, host.migration("m", PAGES) as (vmm, sender):
        await asked_for(host, vmm, sender, 3, 200)
        for page in (3, 200):
            os.pwrite(sender.fd, b"?", page * PAGE + 17)
        ended = await send(host, sender, "--verify")
        await done(vmm)
        told = json.loads(ended.stdout)
        said = f"{PAGES} pages compared, 0 left out, 2 differ, first page 3 of region 0"
        assert (told["ok"], told["verified"], told["mismatches"]) == (False, PAGES, 2)
        assert ended.returncode == os.EX_DATAERR
        assert said in ended.stderr.decode()
        assert await verdict_of(host, "m") == {
            "verified": PAGES,
            "left_out": 0,
            "mismatches": 2,
            "region": 0,
            "page": 3,
        }
        assert said in host.log
        assert vmm.wrong() == []


async def test_pages_of_before_are_left_out(tmp_path: Path) -> None:
    """Nobody had asked for it when they came."""
    async with open_host(tmp_path) as host, host.migration("m", PAGES) as (vmm, sender):
        await asked_for(host, vmm, sender, 3, 200, verify=False)
        migration = await sender.run(verify=True)
        assert migration.progress.verdict == Verdict(PAGES - 2, 2)


async def test_what_the_balloon_took_is_left_out(tmp_path: Path) -> None:
    """But for what had come before it was taken: that was compared as it came."""
    async with open_host(tmp_path) as host, host.migration("m", PAGES) as (vmm, sender):
        await vmm.remove(40, 10)
        await asked_for(host, vmm, sender, 3)
        await vmm.remove(3)
        migration = await sender.run(verify=True)
        await done(vmm)
        assert migration.progress.verdict == Verdict(PAGES - 10, 10)


@pytest.mark.parametrize("how", ["kill", "restart"])
async def test_digests_outlive_the_daemon(how: str, tmp_path: Path) -> None:
    async with open_host(tmp_path) as host, host.migration("m", PAGES) as (vmm, sender):
        await asked_for(host, vmm, sender, 3, 4, 5)
        vmm.map[5 * PAGE] = 0x3F  # the guest's business
        os.pwrite(sender.fd, b"?", 4 * PAGE)
        process = host.cast.daemon.process
        process.send_signal(signal.SIGKILL if how == "kill" else signal.SIGTERM)
        await process.wait()
        await host.cast.start_daemon()
        migration = await sender.run(verify=True)
        await done(vmm)
        assert migration.progress.verdict == Verdict(PAGES, 0, 1, 0, 4)


async def test_across_a_cut_link(tmp_path: Path) -> None:
    async with (
        open_host(tmp_path) as host,
        host.migration("m", PAGES) as (vmm, sender),
        trio.open_nursery() as nursery,
    ):
        proxy = Proxy(host.plan.port, Fault(1, Way.UP, 100 * PAGE + 99))
        await nursery.start(proxy.run)
        migration = await sender.run(port=proxy.port, verify=True)
        await done(vmm)
        assert proxy.happened.is_set()
        assert migration.progress.verdict == Verdict(PAGES)
        nursery.cancel_scope.cancel()


async def test_a_source_that_does_not_stay_for_it(tmp_path: Path) -> None:
    """The guest has all of its memory all the same."""

    def play() -> None:
        with RawSource(host.plan.port, "m", [[0, PAGES, 12]]) as source:
            object.__setattr__(source.hello, "verify", True)
            assert source.join().welcome.verify
            source.switch().control.send(wire.Zero(0, 0, b"\x00\xac\x02"))
            source.control.expect(wire.Complete)

    async with open_host(tmp_path) as host, host.migration("m", PAGES) as (vmm, _):
        await trio.to_thread.run_sync(play)
        await done(vmm)
        assert await verdict_of(host, "m") is None
        assert "complete, and not compared: the source has gone" in host.log


def test_a_destination_that_does_not_stay_for_it(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(content(1) * 8)
    with (
        RawDestination() as destination,
        SourceProcess(destination.port, "m", "--file", path, options=("--lanes", "1", "--verify")) as source,
    ):
        destination.join()
        destination.take_switch()
        destination.control.send(wire.Complete(8))
        destination.hang_up()
        code, told, errors = source.result()
        assert (code, told["ok"], told["verified"], told["left_out"]) == (0, True, 0, 8)
        assert "complete, and not compared: " in errors


# The parts


@pytest.fixture
def memory() -> Iterator[Memory]:
    """Of two regions, the second of a huge page, all in ordinary memory."""
    fd = os.memfd_create("memory", os.MFD_CLOEXEC)
    os.pwrite(fd, os.urandom(4 * MIB), 0)
    regions = [
        Region(offset=0, size=32 * PAGE, page_size=PAGE, gpa=0),
        Region(offset=2 * MIB, size=2 * MIB, page_size=2 * MIB, gpa=1 << 32),
    ]
    with Memory("m", regions, [fd]) as memory:
        yield memory
    os.close(fd)


def file_of(memory: Memory) -> int:
    (found,) = [int(fd) for fd in os.listdir("/proc/self/fd") if name_of(fd) == "/memfd:memory (deleted)"]
    assert memory.pages == 33
    return found


def name_of(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # that of the listing itself
        return ""


def test_digests_are_of_the_content(memory: Memory) -> None:
    fd = file_of(memory)
    some = memory.digests(0, 3, 29)
    assert some == b"".join(crc32c(os.pread(fd, PAGE, page * PAGE)).to_bytes(4, "little") for page in range(3, 32))
    assert memory.digests(1, 0, 1) == crc32c(os.pread(fd, 2 * MIB, 2 * MIB)).to_bytes(4, "little")


def test_a_file_that_was_cut_short_is_told(memory: Memory) -> None:
    os.truncate(file_of(memory), 10 * PAGE)
    with pytest.raises(HandoffError, match="region 0: pages 8 to 11 cannot be read"):
        memory.digests(0, 8, 4)


def test_digests_of_other_memory_are_refused(memory: Memory) -> None:
    with pytest.raises(HandoffError, match="not the digests of this memory: no sealed memfd of 132 bytes"):
        memory.keep_digests(file_of(memory))
    assert memory.digests_fd == -1
    memory.keep_digests()
    with Memory("m", memory.regions, [file_of(memory)]) as other:
        other.keep_digests(memory.digests_fd)
        assert os.fstat(other.digests_fd).st_ino == os.fstat(memory.digests_fd).st_ino


OUT_OF_ORDER: dict[str, tuple[tuple[int, int, bytes], str]] = {
    "another region": ((1, 0, bytes(4)), "digests of region 1 from page 0 on, those of region 0 from page 4 on are"),
    "another page": ((0, 5, bytes(4)), "digests of region 0 from page 5 on, those of region 0 from page 4 on are"),
    "too many": ((0, 4, bytes(4 * 29)), "116 bytes of digests for 28 pages"),
    "none": ((0, 4, b""), "0 bytes of digests for 28 pages"),
    "half of one": ((0, 4, bytes(6)), "6 bytes of digests for 28 pages"),
}


@pytest.mark.parametrize("wrong", OUT_OF_ORDER)
async def test_digests_come_in_order(wrong: str, memory: Memory) -> None:
    what, why = OUT_OF_ORDER[wrong]
    comparison = Comparison(memory, trio.CapacityLimiter(1))
    assert await comparison.take(wire.Digests(0, 0, bytes(16))) is None
    with pytest.raises(ProtocolError, match=why):
        await comparison.take(wire.Digests(*what))


async def test_no_more_after_the_last(memory: Memory) -> None:
    comparison = Comparison(memory, trio.CapacityLimiter(1))
    assert await comparison.take(wire.Digests(0, 0, bytes(4 * 32))) is None
    assert await comparison.take(wire.Digests(1, 0, bytes(4))) == Verdict(left_out=33)
    with pytest.raises(ProtocolError, match="those of region 2"):
        await comparison.take(wire.Digests(1, 0, bytes(4)))
