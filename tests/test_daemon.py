"""`gmemd serve` and `gmemd-source` as processes, guests arriving over TCP, faults on a real userfaultfd."""

import random
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.daemon import DaemonProcess
from support.pace import EMULATED
from support.polling import eventually
from support.source import Result, SourceProcess, guest_content
from support.vmm import PAGE, Vmm

pytest_plugins = ["support.daemon_fixtures"]

PAGES = 512
LONGER_THAN_SILENCE_IS_BORNE = 1.3


@pytest.fixture
def content(tmp_path: Path, rng: random.Random) -> bytes:
    """What the guest has, in `tmp_path`/memory, too."""
    content = guest_content(rng, PAGES)
    (tmp_path / "memory").write_bytes(content)
    return content


def assert_arrives(vmm: Vmm, content: bytes) -> None:
    """From "ready" to "done", with a guest that reads something meanwhile."""
    assert vmm.expect("ready")["trap"] in ("minor", "missing+minor")
    for page in (PAGES - 1, 7, 100):
        assert vmm.read(page) == content[page * PAGE :][:PAGE]
    assert vmm.expect("done") == {"done": True, "pages": len(content) // PAGE}
    assert vmm.read(0, pages=len(content) // PAGE) == content
    assert vmm.receive() == {}


def assert_sent(result: Result, name: str) -> None:
    assert result.errors == ""
    assert result.code == 0
    assert result.told["ok"] is True
    assert result.told["migration"] == name
    assert result.told["recoveries"] == 0 or EMULATED


def test_vmm_comes_first(daemon: DaemonProcess, tmp_path: Path, content: bytes) -> None:
    with Vmm(len(content)) as vmm:
        vmm.hand_off(daemon.socket, "vmm-first")
        assert eventually(lambda: daemon.status()["migrations"])[0]["phase"] == "waiting"
        with SourceProcess(daemon.port, "vmm-first", "--file", tmp_path / "memory") as source:
            assert_arrives(vmm, content)
            assert_sent(source.result(), "vmm-first")


def test_source_comes_first(daemon: DaemonProcess, tmp_path: Path, content: bytes) -> None:
    before = daemon.descriptors()
    with SourceProcess(daemon.port, "source-first", "--file", tmp_path / "memory") as source, Vmm(len(content)) as vmm:
        eventually(lambda: daemon.descriptors() > before)
        time.sleep(LONGER_THAN_SILENCE_IS_BORNE)
        vmm.hand_off(daemon.socket, "source-first")
        assert_arrives(vmm, content)
        assert_sent(source.result(), "source-first")


def test_several_at_once(daemon: DaemonProcess, tmp_path: Path, rng: random.Random) -> None:
    """Each of three regions, in one file that the source sends as three, or in three."""
    guests = {f"guest-{i}": guest_content(rng, PAGES) for i in range(6)}
    with ExitStack() as stack:
        vmms, sources = {}, {}
        for name, content in guests.items():
            (tmp_path / name).write_bytes(content)
            vmms[name] = stack.enter_context(Vmm(len(content))).hand_off(daemon.socket, name)
        for name in reversed(guests):
            sources[name] = stack.enter_context(SourceProcess(daemon.port, name, "--file", tmp_path / name))
        for name, content in guests.items():
            assert_arrives(vmms[name], content)
        for name in guests:
            assert_sent(sources[name].result(), name)


def test_nothing_is_left_of_a_migration(daemon: DaemonProcess, tmp_path: Path, content: bytes) -> None:
    before = daemon.descriptors()
    for name in ("once", "twice"):
        with Vmm(len(content)) as vmm:
            vmm.hand_off(daemon.socket, name)
            with SourceProcess(daemon.port, name, "--file", tmp_path / "memory") as source:
                assert_arrives(vmm, content)
                assert_sent(source.result(), name)
        assert daemon.ended(name)["phase"] == "complete"
        eventually(lambda: daemon.descriptors() <= before)
        assert daemon.status()["migrations"] == []
