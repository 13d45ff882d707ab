"""The ends that nobody wants: a VMM that breaks its word or dies, a source that is gone for good, a host without
space."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from support.recovery import PAGE, Host, Vmm, content, open_host

from gmemd.errors import AbandonedError
from gmemd.keeping import ENDED
from gmemd_tools.demo.cast import Cast
from gmemd_tools.demo.options import usual
from gmemd_tools.demo.plan import Plan

pytestmark = pytest.mark.deadline(20)

PAGES = 512
SPACE_IS_SEEN = 1.0  # seconds


def kept_names(host: Host) -> set[str]:
    """What the holder keeps of guests now, but how they ended."""
    return {name for name in host.kept() if not name.startswith(f"{ENDED}.")}


async def over(host: Host, migration: str) -> dict[str, Any]:
    """What is told of a migration that is over: what was kept of it has been let go by then."""
    while True:
        for told in (await host.ask(command="status"))["finished"]:
            if told["migration"] == migration:
                return dict(told)
        await trio.sleep(0.01)


async def stuck(host: Host, migration: str) -> dict[str, Any]:
    """Waits until pages cannot be put in place."""
    while not (told := await host.told(migration))["stuck"]:
        await trio.sleep(0.01)
    return told


async def finish(vmm: Vmm) -> None:
    assert (await vmm.hear())["ready"]
    assert (await vmm.hear())["done"]


async def test_a_truncated_memory_file_harms_nobody_else(tmp_path: Path) -> None:
    async with (
        open_host(tmp_path, populate="copy") as host,
        host.migration("cut-short", PAGES) as (vmm, sender),
        host.migration("other", PAGES) as (other, other_sender),
        trio.open_nursery() as nursery,
    ):
        os.truncate(vmm.file, PAGES // 2 * PAGE)
        nursery.start_soon(sender.run)
        await host.until("cut-short", pages_received=PAGES // 2)
        assert (await stuck(host, "cut-short"))["phase"] == "running"
        nursery.start_soon(other_sender.run)
        await finish(other)
        assert other.wrong() == []
        assert host.cast.daemon.process.returncode is None
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("seen", [True, False])
async def test_a_dead_vmm_is_noticed_and_forgotten(seen: bool, tmp_path: Path) -> None:
    """It is killed in the middle, before the daemon's eyes or while there is none; another goes on as if nothing had
    been."""
    async with open_host(tmp_path) as host, host.migration("other", PAGES) as (other, sender):
        options = usual(memory="16M", vcpus=1, lanes=1)
        plan = Plan(options, tmp_path, rate=1 << 20, held=host.plan.held)
        pair = Cast(plan, host.cast.stage)
        await pair.start_source()
        await pair.start_destination()
        await host.until("demo", phase="waiting")
        await pair.start_sender()
        await pair.destination.event("ready")
        assert {name.partition(".")[2] for name in kept_names(host)} == {"demo", "other"}
        if not seen:
            host.cast.daemon.process.kill()
            await host.cast.daemon.process.wait()
        pair.destination.process.kill()
        await pair.destination.process.wait()
        if not seen:
            await host.cast.start_daemon()
        told = await over(host, "demo")
        assert told["phase"] == "abandoned"
        assert told["link"] == "the VMM has died"
        assert {name.partition(".")[2] for name in kept_names(host)} == {"other"}
        code = await pair.sender.process.wait()
        assert code == AbandonedError.exit_code
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sender.run)
            await finish(other)
        assert other.wrong() == []
        await over(host, "other")
        assert kept_names(host) == set()


async def test_a_source_gone_for_good(tmp_path: Path) -> None:
    """Nothing is let go: the guest waits, and the status says for what and since when, until an operator gives up."""
    async with open_host(tmp_path) as host, host.migration("orphan", PAGES) as (vmm, sender):
        async with trio.open_nursery() as source:

            async def send() -> None:
                await sender.run(background=False)

            source.start_soon(send)
            assert (await vmm.hear())["ready"]
            assert await vmm.read(7) == content(7)
            source.cancel_scope.cancel()
        async with trio.open_nursery() as guest:
            guest.start_soon(vmm.read, 9)
            while not ((told := await host.told("orphan"))["waits"] and told["link"]):
                await trio.sleep(0.01)
            before = told["waits"][0]
            assert (before["region"], before["page"], told["phase"]) == (0, 9, "running")
            while (await host.told("orphan"))["waits"][0]["for_us"] < before["for_us"] + 100_000:
                await trio.sleep(0.01)
            await host.ask(command="abandon", migration="orphan")
            assert (await vmm.hear())["abandoned"]
            guest.cancel_scope.cancel()
        await over(host, "orphan")
        assert kept_names(host) == set()


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for half a guest; `mount -o remount,size=…` gives it more."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={PAGES // 2 * PAGE}", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("populate", ["write", "recv", "copy"])
async def test_space_that_comes_back(tmp_path: Path, small_tmpfs: Path, populate: str) -> None:
    fd = os.open(small_tmpfs / "guest", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    async with (
        open_host(tmp_path, populate=populate) as host,
        host.migration("cramped", PAGES, file=fd) as (vmm, sender),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(sender.run)
        assert (await vmm.hear())["ready"]
        await stuck(host, "cramped")
        nursery.start_soon(vmm.read, PAGES - 1)
        # Said once, however often it is tried.
        while (told := await host.told("cramped"))["counters"]["requests"] < 3:
            await trio.sleep(0.01)
        assert "No space left" in told["stuck"]
        assert [wait["page"] for wait in told["waits"]] == [PAGES - 1]
        assert host.log.count("No space left") == 1
        assert told["counters"]["dropped_pages"] == 0  # the lanes have kept what they cannot put in place
        subprocess.run(["mount", "-o", f"remount,size={2 * PAGES * PAGE}", str(small_tmpfs)], check=True)
        with trio.fail_after(SPACE_IS_SEEN):
            assert (await vmm.hear())["done"]
        assert vmm.wrong() == []
        assert (await over(host, "cramped"))["stuck"] is None


async def test_an_operator_gives_up(tmp_path: Path) -> None:
    async with open_host(tmp_path) as host, host.migration("unwanted", PAGES) as (vmm, _):
        answer = await host.ask(command="abandon", migration="unwanted")
        assert answer == {"abandoned": "unwanted", "pages_missing": PAGES}
        assert "operator" in (await vmm.hear())["abandoned"]
        await over(host, "unwanted")
        assert kept_names(host) == set()
        assert host.cast.daemon.process.returncode is None
        host.cast.daemon.process.send_signal(signal.SIGTERM)
        assert await host.cast.daemon.process.wait() == 0
