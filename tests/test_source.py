"""`gmemd-source` as a process, its destination played by the test, message by message."""

import os
import random
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.connection import BEAT, FRAME, PAGES, REQUEST, ZERO, frame
from support.rawdestination import RawDestination
from support.source import SourceProcess, guest_content
from support.sourcevmm import SourceVmm
from support.vmm import PAGE

from gmemd import stages
from gmemd.errors import LinkError
from gmemd.migrate import wire
from gmemd.migrate.pagelanes import FIRST_PAUSE, JITTER, LONGEST_PAUSE

COUNT = 32


@pytest.fixture
def destination() -> Iterator[RawDestination]:
    with RawDestination() as destination:
        yield destination


@pytest.fixture
def content(rng: random.Random) -> bytes:
    return guest_content(rng, COUNT)


@pytest.fixture
def vmm(tmp_path: Path, content: bytes) -> Iterator[SourceVmm]:
    with SourceVmm(tmp_path / "vmm.sock", content) as vmm:
        yield vmm


@pytest.fixture
def source(destination: RawDestination, vmm: SourceVmm) -> Iterator[SourceProcess]:
    """A gmemd-source that has its VMM's memory."""
    with SourceProcess(destination.port, "m", "--vmm", vmm.path, options=("--lanes", "1")) as source:
        vmm.hand_over("m")
        yield source


def test_a_whole_migration(
    destination: RawDestination, vmm: SourceVmm, source: SourceProcess, content: bytes, rng: random.Random
) -> None:
    hello = destination.join()
    assert (hello.migration, hello.epoch, hello.token, hello.lanes) == ("m", 0, b"", 1)
    assert hello.regions == [[0, COUNT, 12]]
    state = rng.randbytes(150_000)  # some pieces
    vmm.pause(state)
    assert destination.take_switch() == state
    assert destination.ask(7) == content[7 * PAGE : 8 * PAGE]
    pages = destination.take_pages(1, COUNT - 1)
    assert all(content[page * PAGE :][:PAGE] == data for page, data in pages.items())
    destination.control.expect(wire.Pushed)
    destination.control.send(wire.Complete(COUNT))
    assert vmm.receive() == {"done": True}
    assert vmm.receive() == {}
    code, told, errors = source.result()
    assert (code, errors) == (0, "")
    assert told["ok"] is True
    assert (told["pages"], told["urgent_pages"], told["recoveries"]) == (COUNT, 1, 0)


@pytest.mark.usefixtures("source")
def test_nothing_is_sent_before_the_guest_has_stopped(
    destination: RawDestination, vmm: SourceVmm, content: bytes
) -> None:
    """It still writes: what a request could get now would be old by the time it runs elsewhere."""
    destination.join()
    lane = destination.lanes[0].socket
    lane.sendall(frame(REQUEST, 0, 7, 1))
    lane.recv(1)  # of a sign of life, or of a page
    assert vmm.receive() == {"pause": True}
    os.pwrite(vmm.files[0], content[:PAGE], 7 * PAGE)
    vmm.answer({"paused": True})
    destination.take_switch()
    lane.recv(FRAME.size - 1, socket.MSG_WAITALL)
    assert destination.ask(7) == content[:PAGE]


def test_holes_are_told_and_not_sent(destination: RawDestination, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(COUNT * PAGE)
        os.pwrite(file.fileno(), b"x" * PAGE, 3 * PAGE)
    with SourceProcess(destination.port, "m", "--file", path, options=("--lanes", "1")) as source:
        destination.join()
        destination.take_switch()
        told = b""
        while isinstance(message := destination.control.receive(), wire.Zero):
            told += message.runs
        assert (told, message) == (bytes([0, 3, 1, COUNT - 4]), wire.Pushed())
        assert destination.take_pages(1, 1) == {3: b"x" * PAGE}
        destination.control.send(wire.Complete(COUNT))
        assert source.result().code == 0


def test_what_was_lost_is_sent_again_and_nothing_else(
    destination: RawDestination, vmm: SourceVmm, source: SourceProcess, content: bytes
) -> None:
    destination.join(received=(wire.Received(0, 0, bytes([0, COUNT - 4])),))
    vmm.pause()
    destination.take_switch()
    assert destination.take_pages(1, 4).keys() == set(range(COUNT - 4, COUNT))
    destination.control.expect(wire.Pushed)
    destination.control.send(wire.Received(0, 0, bytes([0, 5])), wire.Received(0, 5, bytes([2, COUNT - 7])), wire.Go())
    assert destination.take_pages(1, 2) == {page: content[page * PAGE :][:PAGE] for page in (5, 6)}
    destination.control.expect(wire.Pushed)
    destination.control.send(wire.Complete(COUNT))
    assert source.result().code == 0


@pytest.mark.usefixtures("source")
def test_a_request_right_behind_the_answer_to_a_lane(destination: RawDestination, content: bytes) -> None:
    """The destination asks for what is waited for as soon as a lane is there."""
    destination.greet(switched=True)
    for _ in range(2):
        lane = destination.accept()
        hello = lane.expect(wire.LaneHello)
        destination.lanes[hello.lane] = lane
        requests = b"".join(frame(REQUEST, 0, page, 1) for page in (9, 11)) if hello.lane == 0 else b""
        lane.socket.sendall(lane.coded(wire.LaneWelcome()) + requests)
    assert destination.take_pages(0, 2) == {page: content[page * PAGE :][:PAGE] for page in (9, 11)}


def test_another_connection_goes_on(
    destination: RawDestination, vmm: SourceVmm, source: SourceProcess, content: bytes
) -> None:
    """With the epoch and the token of the last one, and without another pause."""
    destination.join()
    vmm.pause(b"state")
    assert destination.take_switch() == b"state"
    token = destination.token
    destination.hang_up()
    hello = destination.join(epoch=2, switched=True, received=(wire.Received(0, 0, bytes([1, COUNT - 1])),))
    assert (hello.epoch, hello.token) == (1, token)
    assert destination.take_pages(1, 1) == {0: content[:PAGE]}
    destination.control.expect(wire.Pushed)
    destination.control.send(wire.Complete(COUNT))
    assert vmm.receive() == {"done": True}
    assert source.result().told["recoveries"] == 1


def test_waiting_for_the_vmm_there_is_no_recovery(
    destination: RawDestination, vmm: SourceVmm, source: SourceProcess
) -> None:
    control = destination.accept()
    control.expect(wire.Hello)
    control.send(wire.Waiting())
    control.close()
    destination.join()
    vmm.pause()
    destination.take_switch()
    destination.control.send(wire.Complete(COUNT))
    assert vmm.receive() == {"done": True}
    assert source.result().told["recoveries"] == 0


@pytest.mark.usefixtures("source")
def test_a_lane_that_fails_each_time_comes_less_and_less_often(destination: RawDestination) -> None:
    destination.greet()
    times: list[float] = []
    while len(times) < 7:
        lane = destination.accept()
        if lane.expect(wire.LaneHello).lane == 0:
            times.append(time.monotonic())
        lane.send(wire.LaneWelcome())
        lane.close()
    pauses = sum(min(FIRST_PAUSE * 2**n, LONGEST_PAUSE) * (1 - JITTER) for n in range(len(times) - 2))
    assert times[-1] - times[0] >= pauses


def test_the_end_may_be_told_to_a_new_connection(
    destination: RawDestination, vmm: SourceVmm, source: SourceProcess
) -> None:
    destination.join()
    vmm.pause()
    destination.take_switch()
    destination.hang_up()
    control = destination.accept()
    assert control.expect(wire.Hello).epoch == 1
    control.send(wire.Complete(COUNT))
    assert vmm.receive() == {"done": True}
    assert source.result().code == 0


def refuse_at_once(destination: RawDestination, _: SourceVmm) -> None:
    control = destination.accept()
    control.expect(wire.Hello)
    control.send(wire.Refused("not you"))


def refuse_before_the_switch(destination: RawDestination, _: SourceVmm) -> None:
    destination.greet()
    destination.control.send(wire.Refused("not you"))


def refuse_after_the_switch(destination: RawDestination, vmm: SourceVmm) -> None:
    destination.join()
    vmm.pause()
    destination.take_switch()
    destination.control.send(wire.Refused("not you"))


def refuse_when_the_guest_is_there_already(destination: RawDestination, _: SourceVmm) -> None:
    destination.greet(switched=True)
    destination.control.send(wire.Refused("not you"))


def end_before_the_switch(destination: RawDestination, _: SourceVmm) -> None:
    destination.greet()
    destination.control.send(wire.Failed("the VMM has died"))


def complete_before_the_switch(destination: RawDestination, _: SourceVmm) -> None:
    destination.greet()
    destination.control.send(wire.Complete(COUNT))


def complete_at_once(destination: RawDestination, _: SourceVmm) -> None:
    control = destination.accept()
    control.expect(wire.Hello)
    control.send(wire.Complete(COUNT))


REFUSED, GIVEN_UP = "refused: not you", "given up: the VMM has died"
EARLY = "control lane: complete while joining: sent by the destination"
AT_ONCE = "control lane: complete in place of welcome: sent by the destination"


@pytest.mark.parametrize(
    ("say_no", "why", "code", "resume"),
    [
        (refuse_at_once, REFUSED, os.EX_PROTOCOL, False),
        (refuse_before_the_switch, REFUSED, os.EX_PROTOCOL, True),
        (refuse_after_the_switch, REFUSED, os.EX_PROTOCOL, False),
        (refuse_when_the_guest_is_there_already, REFUSED, os.EX_PROTOCOL, False),
        (end_before_the_switch, GIVEN_UP, os.EX_UNAVAILABLE, True),
        (complete_before_the_switch, EARLY, os.EX_PROTOCOL, True),
        (complete_at_once, AT_ONCE, os.EX_PROTOCOL, False),
    ],
)
def test_the_guest_runs_again_only_if_it_cannot_run_elsewhere(
    destination: RawDestination,
    vmm: SourceVmm,
    source: SourceProcess,
    say_no: Callable[[RawDestination, SourceVmm], None],
    why: str,
    code: int,
    resume: bool,
) -> None:
    say_no(destination, vmm)
    told = vmm.receive()
    assert str(told.pop("error")).endswith(why)
    assert told == ({"resume": True} if resume else {})
    result = source.result()
    assert result.code == code
    assert re.fullmatch(f"gmemd-source: .*{re.escape(why)}\n", result.errors)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "not a gmemd connection: it begins with b'HTTP/1'"),
        (wire.PREAMBLE.pack(wire.MAGIC, 9) + bytes(64), "protocol version 9 (this is version 1)"),
        (wire.preamble() + wire.HEAD.pack(2**31, 0), "a message of 2147483648 bytes (131072 at most)"),
        (wire.preamble() + wire.encode(wire.Go()), "control lane: go while greeted"),
    ],
)
def test_somebody_else_listens_there(destination: RawDestination, source: SourceProcess, data: bytes, why: str) -> None:
    destination.accept().socket.sendall(data)
    code, _, errors = source.result()
    assert code == os.EX_PROTOCOL
    assert re.fullmatch(f"gmemd-source: .*{re.escape(why)}: sent by the destination\n", errors)


WRONG_REQUESTS = {
    "region": (frame(REQUEST, 1, 0, 1), "urgent lane: region 1 of 1"),
    "page": (frame(REQUEST, 0, COUNT, 1), f"urgent lane: page {COUNT} outside region 0 ({COUNT} pages)"),
    "no page": (frame(REQUEST, 0, 0, 0), "urgent lane: a frame of 0 pages of region 0"),
    "too many": (frame(REQUEST, 0, 0, 65), "urgent lane: a frame of 65 pages of region 0"),
    "pages": (frame(PAGES, 0, 0, 1, bytes(PAGE)), "urgent lane: frame of kind 2"),
    "zeros": (frame(ZERO, 0, 0, 1), "urgent lane: frame of kind 3"),
    "a beat that is none": (frame(BEAT, 0, 1, 0), "urgent lane: a beat that names pages"),
    "noise": (bytes(range(32)), "urgent lane: no frame begins with 0x0100"),
}


@pytest.mark.parametrize(("data", "why"), WRONG_REQUESTS.values(), ids=WRONG_REQUESTS.keys())
def test_wrong_requests(
    destination: RawDestination, vmm: SourceVmm, source: SourceProcess, data: bytes, why: str
) -> None:
    destination.join()
    vmm.pause()
    destination.take_switch()
    destination.lanes[0].socket.sendall(data)
    told = destination.until_failed()
    assert told.startswith(why)
    assert told.endswith(": sent by the destination")
    result = source.result()
    assert (result.code, result.errors) == (os.EX_PROTOCOL, f"gmemd-source: {told}\n")


def test_received_pages_that_do_not_exist(destination: RawDestination, source: SourceProcess) -> None:
    destination.join(received=(wire.Received(0, 0, bytes([COUNT, 1])),))
    assert destination.until_failed() == f"runs: page {COUNT} outside a region of {COUNT} pages"
    assert source.result().errors == f"gmemd-source: runs: page {COUNT} outside a region of {COUNT} pages\n"


@pytest.mark.usefixtures("source")
def test_a_silent_destination_is_left(destination: RawDestination, vmm: SourceVmm) -> None:
    """A connection that stands still is as good as none."""
    destination.join()
    vmm.pause()
    destination.take_switch()
    assert destination.control.expect(wire.Pushed)
    with pytest.raises(LinkError):
        destination.control.receive()
    assert destination.join(epoch=2, switched=True).epoch == 1


def test_it_ends_in_its_own_time_when_told_to_stop(
    destination: RawDestination, vmm: SourceVmm, content: bytes, tmp_path: Path
) -> None:
    """And writes down what it has."""
    options = ("--lanes", "1", "--stages", str(tmp_path / "stages"))
    with SourceProcess(destination.port, "m", "--vmm", vmm.path, options=options) as source:
        vmm.hand_over("m")
        destination.join()
        vmm.pause()
        destination.take_switch()
        assert destination.ask(7) == content[7 * PAGE : 8 * PAGE]
        source.process.send_signal(signal.SIGTERM)
        assert source.result() == (128 + signal.SIGTERM, {}, "")
        assert vmm.receive() == {}
    assert 7 in {page for *_, page in stages.read([tmp_path / "stages"])}


def test_memory_that_goes_away(destination: RawDestination, vmm: SourceVmm) -> None:
    """A VMM that truncates its file: the destination hears what is the matter."""
    options = ("--lanes", "1", "--no-background")
    with SourceProcess(destination.port, "m", "--vmm", vmm.path, options=options) as source:
        vmm.hand_over("m")
        destination.join()
        vmm.pause()
        destination.take_switch()
        os.truncate(vmm.files[0], PAGE)
        destination.lanes[0].socket.sendall(frame(REQUEST, 0, 7, 1))
        assert destination.until_failed().startswith("region 0: pages 7 to 7 cannot be read: ")
        assert "error" in vmm.receive()
        assert source.result().code == os.EX_DATAERR
