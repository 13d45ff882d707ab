"""The guests of the benchmarks look at every page that they touch, and a run in which anything is wrong fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gmemd_tools.bench import ours, qemu
from gmemd_tools.bench.content import NUMBER_BYTES, PAGE, memory_file
from gmemd_tools.bench.programs import PATIENCE, WAIT_NS, ProgramError, image

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MEMORY = 16 << 20
PAGES = MEMORY // PAGE
WRONG = 1234


@pytest.fixture
def content() -> Iterator[Path]:
    with memory_file(MEMORY) as file:
        yield file


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[ours.Daemon]:
    with ours.daemon(tmp_path) as running:
        yield running


@pytest.fixture(params=["thread", "vcpu"])
def guest(request: pytest.FixtureRequest) -> tuple[object, ...]:
    """One that touches each page once, at random."""
    how: tuple[object, ...] = ("--random",)
    if request.param == "vcpu":
        request.getfixturevalue("require_kvm")
        how = "--vcpu", image("binary", PAGES, random=True, touches=PAGES)
    return *how, "--touches", PAGES


def test_a_guest_finds_its_memory_and_tells_how_long_it_waited(
    daemon: ours.Daemon, content: Path, guest: tuple[object, ...]
) -> None:
    told = daemon.move(content, MEMORY, *guest, source=("--no-background",))
    assert told["guest"]["touches"] == PAGES
    waits, (thread,) = told["guest"]["wait_us"], told["daemon"]["threads"]
    assert 0 < thread["waits"] <= told["daemon"]["counters"]["faults"]
    assert waits["sum"] > thread["blocked_us"]  # whoever waits sees more of it than the daemon
    assert waits["p50"] <= waits["p99"] <= waits["max"]


def test_a_guest_that_finds_a_wrong_page_fails_the_run(
    daemon: ours.Daemon, content: Path, guest: tuple[object, ...]
) -> None:
    with content.open("r+b") as file:
        file.seek(WRONG * PAGE)
        file.write(bytes(NUMBER_BYTES))
    with pytest.raises(ProgramError, match=f"^guest: page {WRONG} holds 0$"):
        daemon.move(content, MEMORY, *guest)


@pytest.mark.usefixtures("require_kvm")
def test_a_vcpu_that_has_no_end_is_stopped_when_all_has_come(daemon: ours.Daemon, content: Path) -> None:
    told = daemon.move(content, MEMORY, "--vcpu", image("binary", PAGES, random=False))
    assert told["daemon"]["pages_received"] == PAGES
    assert told["guest"]["touches"] > 0


@pytest.mark.skipif(bool(qemu.missing()), reason="QEMU is not installed")
def test_the_guest_in_qemu_tells_what_ours_does(tmp_path: Path) -> None:
    waits = qemu.move(tmp_path, MEMORY, random=True)["guest_waits_us"]
    assert waits
    assert WAIT_NS / 1000 <= min(waits) <= max(waits) < PATIENCE * 1e6


def test_a_source_that_fails_is_heard(daemon: ours.Daemon, content: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ProgramError, match=r"(?s)^gmemd-source: status \d+: .*--no-such-option"):
        daemon.move(content, MEMORY, source=("--no-such-option",))
    assert capfd.readouterr().err == ""
