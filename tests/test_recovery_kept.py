"""What a daemon finds kept: taken over whole, or not at all."""

import os
import signal
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from support.recovery import LOOK_SECONDS, PAGE, Host, Sender, Vmm, content, open_host

from gmemd import handoff, holder, notify
from gmemd_tools.demo.plan import Plan

pytestmark = pytest.mark.deadline(40)

PAGES = 64
VERSION_AT, MESSAGES_AT, REGION_PAGES_AT = 8, 592, 856 + 8


def kept(host: Host) -> dict[str, list[int]]:
    """What the holder keeps; the descriptors are the caller's."""
    channel, found = holder.take_back(host.store)
    channel.close()
    return found


def close_all(found: dict[str, list[int]]) -> None:
    for fds in found.values():
        for fd in fds:
            os.close(fd)


def names(host: Host) -> set[str]:
    found = kept(host)
    close_all(found)
    return set(found)


def write_state(host: Host, migration: str, at: int, data: bytes) -> bytes:
    """Changes the state that is kept; returns what was there."""
    found = kept(host)
    (state,) = found[f"state.{migration}"]
    old = os.pread(state, len(data), at)
    os.pwrite(state, data, at)
    close_all(found)
    return old


def keep(host: Host, name: str) -> None:
    with handoff.memory_file("odd", b"odd") as fd:
        notify.Notifier(str(host.store)).store(name, [fd])


async def kill(host: Host) -> None:
    host.cast.daemon.process.kill()
    assert await host.cast.daemon.process.wait() == -signal.SIGKILL


@asynccontextmanager
async def half_done(host: Host, name: str) -> AsyncIterator[tuple[Vmm, Sender]]:
    """A guest that runs, has seen one page, and whose source has gone."""
    async with host.migration(name, PAGES) as (vmm, sender):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: sender.run(background=False))
            assert (await vmm.hear())["ready"]
            assert await vmm.read(3) == content(3)
            nursery.cancel_scope.cancel()
        yield vmm, sender


BUG = """
from pathlib import Path
from gmemd import handoff

def ranges_untrusted(*_):
    if Path(__file__).with_name("bug").exists():
        raise ValueError("that of a test")
    return []

handoff.ranges_untrusted = ranges_untrusted
"""


@asynccontextmanager
async def host_with_a_bug(folder: Path) -> AsyncIterator[Host]:
    """A host whose daemon has a bug, met by whoever says "discard" as long as there is a file `bug`."""
    (folder / "sitecustomize.py").write_text(BUG)
    (folder / "bug").touch()
    (folder / "host").mkdir()
    async with open_host(folder / "host", environ={"PYTHONPATH": str(folder)}) as host:
        yield host


async def test_a_bug_that_a_running_guest_meets(tmp_path: Path) -> None:
    """It waits, which is told, until a daemon without it starts."""
    async with host_with_a_bug(tmp_path) as host, half_done(host, "m") as (vmm, sender):
        await vmm.tell({"discard": []})
        while not (await host.ask(command="status"))["unusable"]:
            await trio.sleep(LOOK_SECONDS)
        assert "a bug of gmemd: ExceptionGroup" in (why := await unusable(host, "m"))
        assert "ValueError('that of a test')" in why
        assert why.endswith("; the next start of the daemon tries again")
        (tmp_path / "bug").unlink()
        await kill(host)
        await host.cast.start_daemon()
        await finish(host, vmm, sender)


async def test_a_bug_before_the_guest_has_come(tmp_path: Path) -> None:
    """It still runs at its source: this VMM is told, and another may come."""
    async with host_with_a_bug(tmp_path) as host:
        async with host.migration("m", PAGES) as (vmm, _):
            await vmm.tell({"discard": []})
            assert "a bug of gmemd: " in (await vmm.hear())["error"]
        assert names(host) == set()
        async with host.migration("m", PAGES):
            pass


async def finish(host: Host, vmm: Vmm, sender: Sender) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.run)
        while not (await vmm.hear()).get("done"):
            pass
    assert vmm.wrong() == []
    await host.until(sender.to.migration, phase="complete")


async def unusable(host: Host, name: str) -> str:
    """Why a migration cannot be taken over. Its name is taken all the same."""
    said = await host.ask(command="status")
    (found,) = [u for u in said["unusable"] if u["migration"] == name]
    assert not [m for m in said["migrations"] if m["migration"] == name]
    with Vmm(name, PAGES) as second:
        await second.hand_over(host.handoff)
        assert "another VMM receives it already" in (await second.hear())["error"]
    return str(found["why"])


DAMAGE: dict[str, tuple[int, bytes, str]] = {
    "of a newer gmemd": (VERSION_AT, struct.pack("<I", 3), "state of version 3 (this gmemd knows up to 2)"),
    "damaged": (REGION_PAGES_AT, struct.pack("<Q", 1 << 50), "state damaged: region 0: its number of pages"),
    "of another": (24, b"other\0", "the state is of another migration: 'other'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_state_that_makes_no_sense(damage: str, tmp_path: Path) -> None:
    """Said, and left as it is: the guest waits, others go on, and whoever understands the state takes it over."""
    at, data, why = DAMAGE[damage]
    async with (
        open_host(tmp_path) as host,
        half_done(host, "odd") as (vmm, sender),
        half_done(host, "fine") as (other, other_sender),
        trio.open_nursery() as guest,
    ):
        guest.start_soon(vmm.read, 5)
        await kill(host)
        before = names(host)
        old = write_state(host, "odd", at, data)
        await host.cast.start_daemon()
        assert await unusable(host, "odd") == why
        assert f"cannot be taken over, its guest waits: {why}" in host.log
        await finish(host, other, other_sender)
        assert {name for name in before if name.endswith(".odd")} <= names(host)
        assert vmm.resident() == {3}
        await kill(host)
        write_state(host, "odd", at, old)
        await host.cast.start_daemon()
        assert (await host.told("odd"))["phase"] == "running"  # as soon as it is ready
        await finish(host, vmm, sender)


async def test_a_state_of_the_version_before(tmp_path: Path) -> None:
    """It had no room for messages."""
    async with open_host(tmp_path) as host, half_done(host, "old") as (vmm, sender):
        await kill(host)
        write_state(host, "old", VERSION_AT, struct.pack("<I", 1))
        write_state(host, "old", MESSAGES_AT, bytes(8))
        await host.cast.start_daemon()
        assert write_state(host, "old", VERSION_AT, struct.pack("<I", 2)) == struct.pack("<I", 2)
        await vmm.remove(7)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sender.run)
            while not (await vmm.hear()).get("done"):
                pass
        assert vmm.wrong() == [7]
        assert await vmm.read(7) == bytes(PAGE)


async def test_limits_are_for_those_who_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guests that are here already go on, whatever the configuration says by now."""
    as_before = Plan._config

    def lowered(plan: Plan) -> Path:
        path = as_before(plan)
        path.write_text(path.read_text() + "[limits]\nmigrations = 1\n")
        return path

    async with (
        open_host(tmp_path) as host,
        half_done(host, "one") as (vmm, sender),
        half_done(host, "two") as (other, other_sender),
    ):
        await kill(host)
        monkeypatch.setattr(Plan, "_config", lowered)
        await host.cast.start_daemon()
        await finish(host, vmm, sender)
        with Vmm("three", PAGES) as third:
            await third.hand_over(host.handoff)
            assert "this daemon has 1 migrations already, its limit" in (await third.hear())["error"]
        await finish(host, other, other_sender)


ODD: dict[str, tuple[Callable[[Host], None], str]] = {
    "a part that nobody knows": (lambda host: keep(host, "disk.odd"), "disk: no part that this gmemd knows"),
    "a part twice": (lambda host: keep(host, "fd1.odd"), "fd1: kept more than once"),
    "a part that is missing": (lambda host: notify.Notifier(str(host.store)).remove("fd0.odd"), "fd0: missing"),
}


@pytest.mark.parametrize("odd", ODD)
async def test_parts_that_do_not_fit(odd: str, tmp_path: Path) -> None:
    """Nothing is let go until an operator says so."""
    change, why = ODD[odd]
    async with open_host(tmp_path) as host, half_done(host, "odd") as (vmm, _), trio.open_nursery() as guest:
        guest.start_soon(vmm.read, 5)
        await kill(host)
        keep(host, "somebody's")
        change(host)
        before = names(host)
        await host.cast.start_daemon()
        assert await unusable(host, "odd") == why
        assert names(host) == before
        assert await host.ask(command="abandon", migration="odd") == {"abandoned": "odd", "pages_missing": None}
        assert (await vmm.hear())["abandoned"] == why
        while names(host) != {"somebody's"}:
            await trio.sleep(0.01)
        assert (await host.ask(command="status"))["unusable"] == []
        notify.Notifier(str(host.store)).remove("somebody's")
        guest.cancel_scope.cancel()


async def test_a_switch_that_was_cut_off(tmp_path: Path) -> None:
    """The VMM's own state was kept and the switch not noted, twice: it comes again, and nothing is left of it."""
    async with open_host(tmp_path) as host, host.migration("twice", PAGES) as (vmm, sender):
        await kill(host)
        keep(host, "blob.twice")
        keep(host, "blob.twice")
        await host.cast.start_daemon()
        await finish(host, vmm, sender)
        assert "blob.twice" not in names(host)


async def test_a_handoff_that_was_cut_off_is_let_go(tmp_path: Path) -> None:
    async with open_host(tmp_path) as host:
        for part in ("fd0.early", "fd1.early", "vmm.early"):
            keep(host, part)
        await kill(host)
        await host.cast.start_daemon()
        assert (await host.ask(command="status"))["unusable"] == []
        assert names(host) == set()
