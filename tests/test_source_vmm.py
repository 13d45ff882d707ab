"""`gmemd-source` and a VMM that does wrong, or dies, at the source."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.rawdestination import RawDestination
from support.source import SourceProcess, memory_file
from support.sourcevmm import SourceVmm
from support.vmm import PAGE

from gmemd.migrate import wire

COUNT = 4


@pytest.fixture
def destination() -> Iterator[RawDestination]:
    with RawDestination() as destination:
        yield destination


@pytest.fixture
def vmm(tmp_path: Path) -> Iterator[SourceVmm]:
    with SourceVmm(tmp_path / "vmm.sock", b"x" * COUNT * PAGE) as vmm:
        yield vmm


@pytest.fixture
def source(destination: RawDestination, vmm: SourceVmm) -> Iterator[SourceProcess]:
    with SourceProcess(destination.port, "m", "--vmm", vmm.path, options=("--lanes", "1")) as source:
        yield source


def changed(vmm: SourceVmm, **changes: Any) -> dict[str, Any]:
    return {"regions": [vmm.regions[0] | changes]}


WRONG_ANSWERS: dict[str, tuple[bytes | Callable[[SourceVmm], dict[str, Any]], str]] = {
    "an error": (b'{"error": "no guest of that name"}', "'no guest of that name'"),
    "an error too deep": (b'{"error": ' + b"[" * 900 + b"]" * 900 + b"}", "[[[[[[[...]]]]]]]"),
    "no JSON": (b"{", "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    "no object": (b"7", "not a JSON object"),
    "no regions": (b"{}", '"regions" is not a list of 1 to 1024'),
    "a file that did not come": (lambda vmm: changed(vmm, file=1), "region 0: file = 1 (a whole number from 0 to 0)"),
    "no size": (
        lambda vmm: changed(vmm, size=None),
        "region 0: size = None (a whole number from 0 to 9223372036854775807)",
    ),
    "a file too short": (
        lambda vmm: changed(vmm, size=2 * COUNT * PAGE),
        f"region 0: the file has {COUNT * PAGE} bytes, the region needs {2 * COUNT * PAGE}",
    ),
    "other pages": (
        lambda vmm: changed(vmm, page_size=8192),
        "region 0: page_size = 8192, its memory file has pages of 4096",
    ),
    "too long": (b" " * 131073, "a message of more than 131072 bytes or 64 descriptors"),
}


@pytest.mark.parametrize(("answer", "error"), WRONG_ANSWERS.values(), ids=WRONG_ANSWERS.keys())
def test_wrong_answers_to_send(
    vmm: SourceVmm, source: SourceProcess, answer: bytes | Callable[[SourceVmm], dict[str, Any]], error: str
) -> None:
    vmm.accept()
    vmm.answer(answer(vmm) if callable(answer) else answer, vmm.files)
    code, _, errors = source.result()
    assert code == os.EX_DATAERR
    assert errors in (
        f"gmemd-source: {error}: sent by the VMM\n",
        f"gmemd-source: {vmm.path}: {error}: sent by the VMM\n",
    )


def test_something_else_for_a_memory_file(vmm: SourceVmm, source: SourceProcess) -> None:
    vmm.accept()
    end, other_end = os.pipe()
    vmm.answer({"regions": vmm.regions}, [end])
    os.close(end)
    os.close(other_end)
    code, _, errors = source.result()
    assert code == os.EX_DATAERR
    assert errors == "gmemd-source: region 0: not a memory file (mode 10600): sent by the VMM\n"


def test_it_hangs_up_at_once(vmm: SourceVmm, source: SourceProcess) -> None:
    vmm.accept()
    vmm.hang_up()
    assert source.result()[::2] == (os.EX_UNAVAILABLE, f"gmemd-source: {vmm.path}: the VMM hung up\n")


def test_it_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "nobody.sock"
    with SourceProcess(1, "m", "--vmm", path) as source:
        assert source.result()[::2] == (os.EX_UNAVAILABLE, f"gmemd-source: {path}: No such file or directory\n")


def test_it_dies_while_its_guest_still_runs(vmm: SourceVmm, source: SourceProcess, destination: RawDestination) -> None:
    vmm.hand_over("m")
    destination.greet()
    destination.take_lanes(1)
    vmm.hang_up()
    destination.control.send(wire.Go())
    assert destination.until_failed().startswith(f"{vmm.path}: ")
    code, _, errors = source.result()
    assert code == os.EX_UNAVAILABLE
    assert re.fullmatch(f"gmemd-source: {re.escape(str(vmm.path))}: (Broken pipe|the VMM hung up)\n", errors)


WRONG_PAUSES: dict[str, tuple[dict[str, Any], bytes, str]] = {
    "an error": ({"error": "the guest has ended"}, b"", "'the guest has ended'"),
    "no pause": ({"paused": 1}, b"", "no answer to pause: {'paused': 1}"),
    "no state": ({"paused": True, "state": 1}, b"x", '"state" is 1, of 1 descriptors'),
    "a state of no number": ({"paused": True, "state": "0"}, b"x", "\"state\" is '0', of 1 descriptors"),
    "too much state": (
        {"paused": True, "state": 0},
        bytes((64 << 20) + 1),
        "a state of 67108865 bytes (67108864 at most)",
    ),
}


@pytest.mark.parametrize(("answer", "state", "error"), WRONG_PAUSES.values(), ids=WRONG_PAUSES.keys())
def test_wrong_answers_to_pause(
    vmm: SourceVmm,
    source: SourceProcess,
    destination: RawDestination,
    answer: dict[str, Any],
    state: bytes,
    error: str,
) -> None:
    """The guest may run again: the destination has not got it."""
    vmm.hand_over("m")
    destination.join()
    assert vmm.receive() == {"pause": True}
    fd = memory_file(state)
    vmm.answer(answer, [fd])
    os.close(fd)
    told = destination.until_failed()
    assert told in (f"{error}: sent by the VMM", f"{vmm.path}: {error}: sent by the VMM")
    assert vmm.receive() == {"error": told, "resume": True}
    assert source.result()[::2] == (os.EX_DATAERR, f"gmemd-source: {told}\n")


def test_a_state_that_is_no_file(vmm: SourceVmm, source: SourceProcess, destination: RawDestination) -> None:
    vmm.hand_over("m")
    destination.join()
    assert vmm.receive() == {"pause": True}
    end, other_end = os.pipe()
    vmm.answer({"paused": True, "state": 0}, [end])
    os.close(end)
    os.close(other_end)
    told = destination.until_failed()
    assert told == '"state" cannot be read: Illegal seek: sent by the VMM'
    assert source.result().code == os.EX_DATAERR


def test_a_guest_of_many_regions(tmp_path: Path, destination: RawDestination) -> None:
    contents = [bytes([index + 1]) * PAGE * (index + 1) for index in range(5)]
    with (
        SourceVmm(tmp_path / "many.sock", *contents) as vmm,
        SourceProcess(destination.port, "m", "--vmm", vmm.path, options=("--lanes", "1")) as source,
    ):
        vmm.hand_over("m")
        hello = destination.join()
        assert hello.regions == [[sum(range(i + 1)) * PAGE, i + 1, 12] for i in range(5)]
        vmm.pause()
        destination.take_switch()
        got: dict[int, bytes] = {}
        while len(got) < 5:
            _, region, first, count, payload = destination.lanes[1].read_frame()
            assert (first, count) == (0, region + 1)
            got[region] = payload
        assert got == dict(enumerate(contents))
        destination.control.expect(wire.Pushed)
        destination.control.send(wire.Complete(15))
        assert source.result().code == 0
