"""Connections that break or stand still at chosen bytes, and senders that are killed: every page arrives, right."""

import random
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trio
from support.connection import FRAME
from support.daemon import DaemonProcess
from support.polling import eventually
from support.proxy import Fault, Proxy, Way
from support.source import Result, SourceProcess, guest_content
from support.vmm import PAGE, Vmm

from gmemd.migrate import wire

pytest_plugins = ["support.daemon_fixtures"]

PAGES = 600
UP, DOWN = Way.UP, Way.DOWN
NUMBERS = count()


class Migration:
    """One guest, whose source comes through a proxy, and comes again after it was killed."""

    def __init__(self, daemon: DaemonProcess, folder: Path, *options: str) -> None:
        self.daemon = daemon
        self.name = f"m{next(NUMBERS):02}"
        self.content = guest_content(random.Random(3), PAGES)
        self.path = folder / self.name
        self.path.write_bytes(self.content)
        self.options = ("--lanes", "1", *options)
        self.halfway_epoch = 1  # the guest waits for it when it has read half

    async def run(self, fault: Fault, *, kill: bool = False) -> tuple[Result, dict[str, Any]]:
        """How the source ended, and what the daemon told of the migration."""
        proxy = Proxy(self.daemon.port, fault._replace(act=self._kill) if kill else fault)
        async with trio.open_nursery() as nursery:
            await nursery.start(proxy.run)
            with Vmm(len(self.content)) as vmm, ExitStack() as sources:
                vmm.hand_off(self.daemon.socket, self.name)
                self._source = sources.enter_context(self._start(proxy.port))
                async with trio.open_nursery() as guest:
                    guest.start_soon(trio.to_thread.run_sync, self._arrives, vmm)
                    await proxy.happened.wait()
                    if kill:
                        await trio.to_thread.run_sync(self._source.process.wait)
                        self._source = sources.enter_context(self._start(proxy.port))
                result = await trio.to_thread.run_sync(self._source.result)
            nursery.cancel_scope.cancel()
        return result, self.daemon.ended(self.name)

    def _start(self, port: int) -> SourceProcess:
        return SourceProcess(port, self.name, "--file", self.path, options=self.options)

    async def _kill(self) -> None:
        self._source.process.kill()

    def _arrives(self, vmm: Vmm) -> None:
        """The guest reads all that there is, the last page first."""
        vmm.expect("ready")
        for page in reversed(range(PAGES)):
            if page == PAGES // 2 and self.halfway_epoch > 1:
                eventually(lambda: self.daemon.migration(self.name)["epoch"] >= self.halfway_epoch)
            assert vmm.read(page) == self.content[page * PAGE :][:PAGE]
        assert vmm.expect("done")["pages"] == PAGES
        assert vmm.content() == self.content


HELLO = len(wire.preamble() + wire.encode(wire.Hello("m00", 0, b"", 1, True, [[0, PAGES, 12]])))
SWITCH = HELLO + len(wire.encode(wire.Switch(0)))
WELCOME = len(wire.preamble() + wire.encode(wire.Welcome(1, bytes(16), True, False)))
GO = WELCOME + len(wire.encode(wire.Go()))
LANE_HELLO = len(wire.preamble() + wire.encode(wire.LaneHello("m00", 1, 0, bytes(16))))
LANE_WELCOME = len(wire.preamble() + wire.encode(wire.LaneWelcome()))
HEADER = FRAME.size

# Where the control lane breaks, and how many sessions the daemon has then seen at least.
CONTROL_CUTS = {
    "in the preamble": (UP, 3, 1),
    "in hello": (UP, 30, 1),
    "behind hello": (UP, HELLO, 1),
    "in switch": (UP, HELLO + 9, 2),
    "behind switch": (UP, SWITCH, 2),
    "in pushed": (UP, SWITCH + 9, 1),  # with everything there, or not
    "in the answer's preamble": (DOWN, 3, 2),
    "in welcome": (DOWN, 30, 2),
    "behind welcome": (DOWN, WELCOME, 2),
    "in go": (DOWN, WELCOME + 9, 2),
    "behind go": (DOWN, GO, 2),
    "in what comes behind go": (DOWN, GO + 9, 1),  # the end, or not
}


@pytest.mark.parametrize(("way", "byte", "sessions"), CONTROL_CUTS.values(), ids=CONTROL_CUTS.keys())
async def test_the_control_lane_breaks(
    daemon: DaemonProcess, tmp_path: Path, way: Way, byte: int, sessions: int
) -> None:
    # Nothing comes unasked where there has to be another session, so that the end cannot come before it.
    migration = Migration(daemon, tmp_path, *(("--no-background",) if sessions > 1 else ()))
    migration.halfway_epoch = sessions
    result, told = await migration.run(Fault("control", way, byte))
    assert (result.code, result.errors) == (0, "")
    assert told["epoch"] >= sessions
    assert told["recoveries"] == told["epoch"] - 1


LANE_CUTS = {
    "in hello": (UP, 30),
    "behind hello": (UP, LANE_HELLO),
    "in a header": (UP, LANE_HELLO + 3 * (HEADER + PAGE) + 7),
    "behind a header": (UP, LANE_HELLO + HEADER),
    "in a page": (UP, LANE_HELLO + HEADER + 1000),
    "in the middle": (UP, 300_000),
    "in the answer to hello": (DOWN, 20),
    "behind the answer to hello": (DOWN, LANE_WELCOME),
}
REQUEST_CUTS = {
    "in a request": (DOWN, LANE_WELCOME + 5),
    "behind a request": (DOWN, LANE_WELCOME + 3 * HEADER),
    "in the hundredth request": (DOWN, LANE_WELCOME + 99 * HEADER + 31),
}


@pytest.mark.parametrize(("way", "byte"), LANE_CUTS.values(), ids=LANE_CUTS.keys())
async def test_a_background_lane_breaks(daemon: DaemonProcess, tmp_path: Path, way: Way, byte: int) -> None:
    result, told = await Migration(daemon, tmp_path).run(Fault(1, way, byte))
    assert (result.code, result.errors, result.told["recoveries"], told["epoch"]) == (0, "", 0, 1)


@pytest.mark.parametrize(("way", "byte"), (LANE_CUTS | REQUEST_CUTS).values(), ids=(LANE_CUTS | REQUEST_CUTS).keys())
async def test_the_urgent_lane_breaks(daemon: DaemonProcess, tmp_path: Path, way: Way, byte: int) -> None:
    """With nothing but that to bring pages: what was asked for is asked again."""
    result, told = await Migration(daemon, tmp_path, "--no-background").run(Fault(0, way, byte))
    assert (result.code, result.errors, result.told["recoveries"], told["epoch"]) == (0, "", 0, 1)


STALLS = {
    "control, up": (("control", UP, SWITCH), 2),
    "control, down": (("control", DOWN, GO), 2),
    "urgent, up": ((0, UP, LANE_HELLO + HEADER + 1000), 1),
    "urgent, down": ((0, DOWN, LANE_WELCOME + 3 * HEADER), 1),
}


@pytest.mark.parametrize(("where", "sessions"), STALLS.values(), ids=STALLS.keys())
async def test_a_connection_stands_still(
    daemon: DaemonProcess, tmp_path: Path, where: tuple[str | int, Way, int], sessions: int
) -> None:
    """Both ends believe in it until they hear nothing for too long."""
    migration = Migration(daemon, tmp_path, "--no-background")
    migration.halfway_epoch = sessions
    result, told = await migration.run(Fault(*where, stall=True))
    assert (result.code, result.errors, told["epoch"]) == (0, "", sessions)


async def test_a_background_lane_stands_still(daemon: DaemonProcess, tmp_path: Path) -> None:
    result, told = await Migration(daemon, tmp_path).run(Fault(1, UP, 300_000, stall=True))
    assert (result.code, result.errors, told["epoch"]) == (0, "", 1)


KILLS = {
    "in hello": ("control", UP, 30),
    "before the guest has left": ("control", DOWN, WELCOME),
    "in switch": ("control", UP, HELLO + 9),
    "behind switch": ("control", UP, SWITCH),
    "in a page that was asked for": (0, UP, LANE_HELLO + HEADER + 1000),
    "in the background": (1, UP, 300_000),
}


@pytest.mark.parametrize("where", KILLS.values(), ids=KILLS.keys())
async def test_the_sender_is_killed_and_started_again(
    daemon: DaemonProcess, tmp_path: Path, where: tuple[str | int, Way, int]
) -> None:
    options = ("--no-background",) if where[0] == 0 else ()
    result, told = await Migration(daemon, tmp_path, *options).run(Fault(*where), kill=True)
    assert (result.code, result.errors) == (0, "")
    assert told["phase"] == "complete"
