"""A daemon from outside: how it starts, what dies around it, how it ends."""

import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from support.connection import PAGES, frame
from support.daemon import DaemonProcess
from support.polling import PATIENCE, eventually
from support.rawsource import RawSource
from support.source import COUNT, SourceProcess
from support.vmm import PAGE, Vmm

from gmemd.daemon import isolated
from gmemd.errors import LinkError
from gmemd.migrate import wire
from gmemd.stopping import STOPPING

pytest_plugins = ["support.daemon_fixtures"]

REGIONS = [[0, COUNT, 12]]


class VmmProcess:
    """A VMM with a process of its own, that has handed its memory over."""

    def __init__(self, daemon: DaemonProcess, migration: str, size: int) -> None:
        command = [sys.executable, "-m", "support.vmm", str(daemon.socket), migration, str(size)]
        environ = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        self.process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
        self.told()

    def told(self) -> dict[str, Any]:
        assert self.process.stdout
        return dict(json.loads(self.process.stdout.readline()))

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_a_vmm_that_dies_takes_only_its_own(daemon: DaemonProcess, tmp_path: Path, content: bytes) -> None:
    before = daemon.descriptors()
    options = ("--no-background",)
    with Vmm(len(content)) as neighbour:
        neighbour.hand_off(daemon.socket, "neighbour")
        doomed = VmmProcess(daemon, "doomed", len(content))
        with (
            SourceProcess(daemon.port, "neighbour", "--file", tmp_path / "memory", options=options) as other,
            SourceProcess(daemon.port, "doomed", "--file", tmp_path / "memory", options=options) as source,
        ):
            assert doomed.told()["ready"] is True
            doomed.kill()
            code, _, errors = source.result()
            assert (code, errors) == (
                os.EX_UNAVAILABLE,
                f"gmemd-source: 127.0.0.1:{daemon.port}: given up: the VMM has died\n",
            )
            assert daemon.ended("doomed")["phase"] == "abandoned"
            neighbour.expect("ready")
            assert neighbour.read(0, pages=COUNT) == content
            neighbour.expect("done")
            assert other.result().code == 0
    eventually(lambda: daemon.descriptors() <= before)


def test_a_vmm_that_dies_before_its_source_comes(daemon: DaemonProcess) -> None:
    before = daemon.descriptors()
    doomed = VmmProcess(daemon, "early", PAGE)
    eventually(lambda: any(m["migration"] == "early" for m in daemon.status()["migrations"]))
    doomed.kill()
    assert daemon.ended("early")["phase"] == "abandoned"
    eventually(lambda: daemon.descriptors() <= before)


@contextmanager
def no_descriptors(daemon: DaemonProcess) -> Iterator[None]:
    """It keeps what it has and gets no more."""
    before = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (3, before[1]))
    yield
    resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, before)


def removed(daemon: DaemonProcess) -> list[str]:
    """What its service manager has let go of, in order."""
    return [name for what, name in pairwise(daemon.manager.told) if what == "FDSTOREREMOVE=1"]


def test_an_end_without_descriptors(tmp_path: Path) -> None:
    """What nobody can be told of any more is let go of all the same, and by the service manager as soon as it can be
    told: first that without which a successor takes nothing over."""
    with DaemonProcess(tmp_path) as daemon:
        before = daemon.descriptors()
        doomed = VmmProcess(daemon, "m", PAGE)
        with RawSource(daemon.port, "m", [[0, 1, 12]]) as source:
            source.join().switch()
            assert doomed.told()["ready"]
            with no_descriptors(daemon):
                doomed.kill()
                eventually(lambda: "a successor will not know how it ended" in daemon.log.read_text())
                assert isinstance(source.control.receive(), wire.Failed)
        assert daemon.ended("m")["phase"] == "abandoned"
        eventually(lambda: daemon.descriptors() <= before)
        eventually(lambda: removed(daemon)[-4:] == [f"FDNAME={what}.m" for what in ("state", "vmm", "fd1", "fd0")])
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log.read_text()


def test_a_state_that_cannot_be_kept_comes_again(tmp_path: Path) -> None:
    """The guest has not left for this host before its state is safe here."""
    with DaemonProcess(tmp_path) as daemon, Vmm(PAGE) as vmm:
        vmm.hand_off(daemon.socket, "m")
        with RawSource(daemon.port, "m", [[0, 1, 12]]) as source:
            source.join()
            with no_descriptors(daemon):
                source.switch(b"state")
                with pytest.raises(LinkError):
                    source.control.receive()
            welcome = source.welcome
        assert "memfd gmemd-vmm-state of 5 bytes: Too many open files" in daemon.log.read_text()
        with RawSource(daemon.port, "m", [[0, 1, 12]], epoch=welcome.epoch, token=welcome.token) as source:
            source.join().switch(b"state")
            vmm.expect("ready")
            assert vmm.state() == b"state"
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log.read_text()


async def test_a_bug_that_is_met_while_all_are_stopped(expect_log: Callable[[str], None]) -> None:
    """The daemon's end is clean nevertheless, and the bug is told."""
    expect_log("ERROR gmemd.daemon: a connection has failed")

    async def fail_when_stopped() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("a bug")

    async def serve(_: trio.socket.SocketType) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail_when_stopped)
            nursery.start_soon(trio.sleep_forever)

    ours, theirs = trio.socket.socketpair()
    with theirs:
        async with trio.open_nursery() as connections:
            connections.start_soon(isolated, serve, ours)
            await trio.testing.wait_all_tasks_blocked()
            connections.cancel_scope.cancel()
        assert await theirs.recv(1) == b""


def test_sockets_are_for_a_group(daemon: DaemonProcess) -> None:
    for path in (daemon.socket, daemon.status_socket):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660


def test_service_manager_is_told(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon, Vmm(PAGE) as vmm:
        assert daemon.manager.told[0] == "READY=1"
        eventually(lambda: "STATUS=0 migrations, 0 running, 0 pages missing" in daemon.manager.told)
        with RawSource(daemon.port, "m", [[0, 1, 12]]) as source:
            vmm.hand_off(daemon.socket, "m")
            source.join().switch()
            vmm.expect("ready")
            eventually(lambda: "STATUS=1 migrations, 1 running, 1 pages missing" in daemon.manager.told)
        assert daemon.stop() == 0
        eventually(lambda: "STOPPING=1" in daemon.manager.told)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_stops_when_told(tmp_path: Path, content: bytes, number: signal.Signals) -> None:
    """In the middle of a migration, too: its VMM sees the connection end, and nothing else."""
    with DaemonProcess(tmp_path) as daemon, Vmm(len(content)) as vmm, RawSource(daemon.port, "m", REGIONS) as source:
        vmm.hand_off(daemon.socket, "m")
        source.join().switch()
        vmm.expect("ready")
        daemon.process.send_signal(number)
        assert daemon.process.wait(PATIENCE) == 0
        assert vmm.receive() == {}
        assert "Traceback" not in daemon.log.read_text()
        for kind, address in (
            (socket.SOCK_SEQPACKET, daemon.socket),
            (socket.SOCK_STREAM, daemon.status_socket),
        ):
            with socket.socket(socket.AF_UNIX, kind) as sock, pytest.raises(ConnectionRefusedError):
                sock.connect(str(address))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", daemon.port))


def test_it_finishes_its_clean_up_when_told_again(tmp_path: Path) -> None:
    """Its source has not heard yet that all is complete, which it is given a second for."""
    with DaemonProcess(tmp_path) as daemon, Vmm(PAGE) as vmm, RawSource(daemon.port, "m", [[0, 1, 12]]) as source:
        vmm.hand_off(daemon.socket, "m")
        source.join().switch()
        vmm.expect("ready")
        source.background.socket.sendall(frame(PAGES, 0, 0, 1, b"x" * PAGE))
        source.control.expect(wire.Complete)
        daemon.tell_to_stop()
        eventually(lambda: "SIGTERM: stopping" in daemon.log.read_text())
        while daemon.process.poll() is None:
            for number in STOPPING:
                daemon.process.send_signal(number)
        assert daemon.process.returncode == 0
        assert daemon.log.read_text().count("stopping") == 1
        eventually(lambda: "STOPPING=1" in daemon.manager.told)


def test_it_stops_when_told_as_soon_as_it_is_ready(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon:
        assert daemon.stop() == 0


def test_a_second_daemon_is_refused(daemon: DaemonProcess) -> None:
    command = [sys.executable, "-m", "gmemd.cli", "serve", "--config", str(daemon.config)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == os.EX_UNAVAILABLE
    assert run.stderr == f"gmemd: {daemon.socket}: another daemon listens there\n"
    assert daemon.status()["migrations"] == []


def test_sockets_of_a_daemon_that_was_killed_are_replaced(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon:
        pass
    assert daemon.socket.is_socket()
    with DaemonProcess(tmp_path) as daemon:
        assert daemon.status()["migrations"] == []


def test_sockets_that_the_service_manager_hands_in(tmp_path: Path, content: bytes) -> None:
    """And keeps: whoever comes while there is no daemon waits for the next one."""
    kinds: dict[str, tuple[socket.AddressFamily, socket.SocketKind, Any]] = {
        "handoff": (socket.AF_UNIX, socket.SOCK_SEQPACKET, str(tmp_path / "gmemd.sock")),
        "source": (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
        "status": (socket.AF_UNIX, socket.SOCK_STREAM, str(tmp_path / "status.sock")),
    }
    with ExitStack() as stack:
        sockets = {}
        for name, (family, kind, address) in kinds.items():
            sockets[name] = stack.enter_context(socket.socket(family, kind))
            sockets[name].bind(address)
            sockets[name].listen()
        handed = {name: sock.fileno() for name, sock in sockets.items()}
        with DaemonProcess(tmp_path, handed=handed) as daemon:
            assert daemon.port == sockets["source"].getsockname()[1]
            assert daemon.stop() == 0
        vmm = stack.enter_context(Vmm(len(content)))
        vmm.hand_off(daemon.socket, "m")
        source = stack.enter_context(SourceProcess(daemon.port, "m", "--file", tmp_path / "memory"))
        with DaemonProcess(tmp_path, handed=handed) as daemon:
            vmm.expect("ready")
            assert vmm.read(0, pages=COUNT) == content
            vmm.expect("done")
            assert source.result().code == 0
            assert daemon.stop() == 0


def test_a_port_in_use(tmp_path: Path, daemon: DaemonProcess) -> None:
    config = tmp_path / "gmemd.toml"
    text = daemon.config.read_text().replace(str(daemon.folder), str(tmp_path))
    config.write_text(text.replace("127.0.0.1:0", f"127.0.0.1:{daemon.port}"))
    command = [sys.executable, "-m", "gmemd.cli", "serve", "--config", str(config)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == os.EX_UNAVAILABLE
    assert f"cannot listen on 127.0.0.1:{daemon.port}: Address already in use" in run.stderr
