"""`gmemd-source --order`, its destination played by the test; and traces that become one."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.rawdestination import RawDestination
from support.source import Result, SourceProcess
from support.vmm import PAGE

from gmemd.errors import DataError
from gmemd.migrate import wire
from gmemd.native.memory import Region
from gmemd.order import merge
from gmemd.trace import MARK, RECORD, TraceReader, TraceWriter
from gmemd_tools.replay import cli

COUNT = 32
GUEST = Region(offset=0, size=COUNT * PAGE, page_size=PAGE, gpa=0)


def trace(path: Path, pages: Sequence[int], region: Region = GUEST, *, step: int = 1000, start: int = 0) -> Path:
    """Faults on these pages, one every `step` ns."""
    with TraceWriter(path, "m", [region]) as writer:
        writer.add(b"".join(RECORD.pack(start + step * at, page, 1, 0, 0) for at, page in enumerate(pages)))
    return path


@pytest.fixture
def destination() -> Iterator[RawDestination]:
    with RawDestination() as destination:
        yield destination


@pytest.fixture
def memory(tmp_path: Path, rng: random.Random) -> Path:
    path = tmp_path / "memory"
    path.write_bytes(rng.randbytes(COUNT * PAGE))
    return path


def send(destination: RawDestination, memory: Path, *orders: Path) -> tuple[list[int], Result]:
    """The pages in the order in which they came."""
    options = ("--lanes", "1", *(f"--order={order}" for order in orders))
    with SourceProcess(destination.port, "m", "--file", memory, options=options) as source:
        destination.join()
        destination.take_switch()
        pages = destination.take_pages(1, COUNT)
        content = memory.read_bytes()
        assert all(content[page * PAGE :][:PAGE] == data for page, data in pages.items())
        destination.control.expect(wire.Pushed)
        destination.control.send(wire.Complete(COUNT))
        return list(pages), source.result()


def rest(*pages: int) -> list[int]:
    return [page for page in range(COUNT) if page not in pages]


def test_pages_come_in_the_order_of_the_trace(destination: RawDestination, memory: Path, tmp_path: Path) -> None:
    pages, (code, told, errors) = send(destination, memory, trace(tmp_path / "t", [9, 4, 4, 30, 9, 5]))
    assert pages == [9, 4, 30, 5, *rest(9, 4, 30, 5)]
    assert (code, told["pages"], told["background_pages"], errors) == (0, COUNT, COUNT, "")


def test_several_files_follow_one_another(destination: RawDestination, memory: Path, tmp_path: Path) -> None:
    pages, _ = send(destination, memory, trace(tmp_path / "0", [20, 2]), trace(tmp_path / "1", [2, 7]))
    assert pages == [20, 2, 7, *rest(20, 2, 7)]


def test_a_trace_of_another_guest(destination: RawDestination, memory: Path, tmp_path: Path) -> None:
    """What fits is used; everything is sent."""
    larger = Region(offset=0, size=2 * COUNT * PAGE, page_size=PAGE, gpa=0)
    pages, (code, _, errors) = send(destination, memory, trace(tmp_path / "t", [40, 3, 63, 2], larger))
    assert pages == [3, 2, *rest(3, 2)]
    assert code == 0
    assert "t: 2 faults are on pages that this guest does not have: passed over" in errors
    assert "sent as without it" not in errors


def test_a_trace_of_nothing_that_is_here(destination: RawDestination, memory: Path, tmp_path: Path) -> None:
    elsewhere = Region(offset=0, size=COUNT * PAGE, page_size=PAGE, gpa=1 << 40)
    pages, (code, _, errors) = send(destination, memory, trace(tmp_path / "t", [5, 3], elsewhere))
    assert (pages, code) == (list(range(COUNT)), 0)
    assert "t: no page of this guest is in it: sent as without it" in errors


def test_a_damaged_trace(destination: RawDestination, memory: Path, tmp_path: Path) -> None:
    """A block that is damaged and one that is cut off; the one between them holds."""
    path = tmp_path / "t"
    with TraceWriter(path, "m", [GUEST]) as writer:
        for page in (5, 9, 7):
            writer.add(RECORD.pack(page, page, 1, 0, 0))
            writer.flush()
    data = bytearray(path.read_bytes())
    data[data.find(MARK) + 20] ^= 1
    path.write_bytes(data[:-1])
    pages, (code, _, errors) = send(destination, memory, path)
    assert (pages, code) == ([9, *rest(9)], 0)
    assert errors.count("damaged or cut off: passed over") == 2


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not a trace"),
        (b"GMTRACE\x1a" + bytes([2, 0, 0, 0]) + bytes(8), "version 2 of the trace format"),
    ],
)
def test_what_is_no_trace_is_refused_before_anything_else(
    memory: Path, tmp_path: Path, content: bytes, why: str
) -> None:
    path = tmp_path / "t"
    path.write_bytes(content)
    with SourceProcess(1, "m", "--file", memory, options=(f"--order={path}",)) as source:
        code, _, errors = source.result()
    assert code == DataError.exit_code
    assert f"{path}: {why}" in errors


def asked_for(destination: RawDestination, memory: Path, learnt: Path, *pages: int) -> list[int]:
    """One migration in which the guest asks for these; returns what the background sent, in its order."""
    options = ("--lanes", "1", "--rate", "1", f"--learn={learnt}")
    with SourceProcess(destination.port, "m", "--file", memory, options=options) as source:
        destination.join()
        destination.take_switch()
        first = list(destination.take_pages(1, 1))
        for page in pages:
            destination.ask(page)
        destination.control.send(wire.Complete(COUNT))
        assert source.result().code == 0
    destination.hang_up()
    return first


def test_what_the_guest_asked_for_comes_first_the_next_time(
    destination: RawDestination, memory: Path, tmp_path: Path
) -> None:
    learnt = tmp_path / "t"
    assert asked_for(destination, memory, learnt, 20, 9, 20)[0] == 0
    assert [page for _, page in pages_of(learnt)] == [20, 9]
    assert asked_for(destination, memory, learnt, 3)[0] == 20
    assert {page for _, page in pages_of(learnt)} == {20, 9, 3}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory", "t"]


def pages_of(path: Path) -> list[tuple[int, int]]:
    with TraceReader(path) as reader:
        return [(fault.time_ns, fault.page) for fault in reader]


def test_traces_become_one(tmp_path: Path) -> None:
    """Each page as soon after its trace's beginning as in the trace that had it soonest; again and again."""
    one = trace(tmp_path / "one", [1, 2, 3], start=10**12)
    two = trace(tmp_path / "two", [3, 9, 9, 1], step=1500)
    assert merge([one, two], one) == 4
    assert pages_of(one) == [(0, 1), (0, 3), (1000, 2), (1500, 9)]
    three = trace(tmp_path / "three", [8])
    assert cli.main(["merge", str(one), str(three), "-o", str(tmp_path / "all")]) == 0
    assert pages_of(tmp_path / "all") == [(0, 1), (0, 3), (0, 8), (1000, 2), (1500, 9)]


def test_files_of_one_rotating_trace_count_from_its_first_fault(tmp_path: Path) -> None:
    path = tmp_path / "m.gmtrace"
    with TraceWriter(path, "m", [GUEST], max_bytes=1) as writer:
        for at in range(3):
            writer.add(b"".join(RECORD.pack(10**9 + at * 10**6, at, 1, 0, 0) for _ in range(3000)))
            writer.flush()
    row = sorted(tmp_path.iterdir())
    assert len(row) > 1
    first = pages_of(row[0])[0][1]
    assert merge(row, tmp_path / "one") == 3 - first
    assert pages_of(tmp_path / "one") == [(10**6 * (page - first), page) for page in range(first, 3)]


def test_traces_of_different_regions_do_not_become_one(tmp_path: Path) -> None:
    other = Region(offset=0, size=PAGE, page_size=PAGE, gpa=0)
    with pytest.raises(DataError, match="2: not of the same regions as"):
        merge([trace(tmp_path / "1", [1]), trace(tmp_path / "2", [0], other)], tmp_path / "3")
    assert not (tmp_path / "3").exists()
