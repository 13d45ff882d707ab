"""Pages that the VMM took out stay out when the daemon dies or is replaced meanwhile."""

import signal
from pathlib import Path

import pytest
import trio
from support.recovery import PAGE, Host, Vmm, content, open_host

from gmemd_tools.demo.cast import Cast

pytest_plugins = ["support.kill_points"]
pytestmark = pytest.mark.deadline(20)

PAGES = 256
ZERO = bytes(PAGE)


async def finish(vmm: Vmm) -> None:
    while not (await vmm.hear()).get("done"):
        pass


def seen(vmm: Vmm, removed: range) -> list[int]:
    """Pages that are neither as at the source nor, where they were removed, zero."""
    return [page for page in range(PAGES) if vmm._read(page) != (ZERO if page in removed else content(page))]


async def killed(cast: Cast) -> None:
    assert await cast.daemon.process.wait() == -signal.SIGKILL
    cast.environ = {}
    await cast.start_daemon()


async def test_a_removal_that_was_read_and_not_noted(kill_points: Path, tmp_path: Path) -> None:
    """The daemon dies between the two: its successor finds the message where it was read to."""
    removed = range(40, 50)
    environ = {"PYTHONPATH": str(kill_points), "PYTHONSAFEPATH": "1", "GM_KILL_POINT": "removal-read:0"}
    async with (
        open_host(tmp_path, environ=environ) as host,
        host.migration("balloon", PAGES) as (vmm, sender),
        trio.open_nursery() as nursery,
    ):
        await vmm.remove(removed.start, len(removed))
        await killed(host.cast)
        await host.until("balloon", pages_received=len(removed))
        nursery.start_soon(sender.run)
        await finish(vmm)
        assert seen(vmm, removed) == []


async def test_a_discard_without_an_answer_is_found_by_the_successor(kill_points: Path, tmp_path: Path) -> None:
    environ = {"PYTHONPATH": str(kill_points), "PYTHONSAFEPATH": "1", "GM_KILL_POINT": "discarded:0"}
    async with (
        open_host(tmp_path, environ=environ) as host,
        host.migration("balloon", PAGES) as (vmm, sender),
        trio.open_nursery() as nursery,
    ):
        await vmm.tell({"discard": [[0, 8, 4]], "id": 1})
        await killed(host.cast)
        assert await vmm.hear() == {"discarded": True, "id": 1}
        nursery.start_soon(sender.run)
        await finish(vmm)
        assert seen(vmm, range(8, 12)) == []


@pytest.mark.parametrize("how", ["restart", "kill"])
async def test_removed_before_between_and_after(how: str, tmp_path: Path) -> None:
    """By the balloon, and by a punch that the VMM tells of: before the daemon ends, while there is none, and after."""
    async with (
        open_host(tmp_path) as host,
        host.migration("balloon", PAGES) as (vmm, sender),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(lambda: sender.run(background=False))
        assert (await vmm.hear())["ready"]
        assert await vmm.read(0) == content(0)
        await vmm.remove(0, 4)
        await discard(vmm, 4, 4)
        await end_daemon(host, how)
        await vmm.tell({"discard": [[0, 12, 4]]})
        async with trio.open_nursery() as between:
            between.start_soon(vmm.remove, 8, 4)
            await host.cast.start_daemon()
        while not (await vmm.hear()).get("discarded"):
            pass
        await vmm.remove(16, 4)
        await discard(vmm, 20, 4)
        assert await vmm.read(2) == ZERO
        for page in range(24, PAGES):
            assert await vmm.read(page) == content(page)
        await finish(vmm)
        assert seen(vmm, range(24)) == []


async def end_daemon(host: Host, how: str) -> None:
    process = host.cast.daemon.process
    process.send_signal(signal.SIGTERM if how == "restart" else signal.SIGKILL)
    await process.wait()


async def discard(vmm: Vmm, first: int, pages: int) -> None:
    await vmm.tell({"discard": [[0, first, pages]]})
    while not (await vmm.hear()).get("discarded"):
        pass
