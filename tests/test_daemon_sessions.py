"""Wrong frames and wrong words in the middle of a session: they end that, not the migration, and no other."""

import re
from collections.abc import Callable

import pytest
from support.connection import BEAT, FRAME, FRAME_MAGIC, PAGES, REQUEST, ZERO, frame
from support.daemon import DaemonProcess
from support.neighbour import COUNT, REGIONS, SETTINGS
from support.polling import eventually
from support.rawsource import RawSource
from support.vmm import PAGE, Touch, Vmm

from gmemd.errors import LinkError
from gmemd.migrate import wire

pytest_plugins = ["support.daemon_fixtures", "support.neighbour_fixtures"]
pytestmark = [pytest.mark.daemon(SETTINGS), pytest.mark.usefixtures("nobody_else_notices")]


def header(**changes: int) -> bytes:
    """Of a frame of one page, with some fields changed; without its payload."""
    fields = {
        "magic": FRAME_MAGIC,
        "kind": PAGES,
        "flags": 0,
        "region": 0,
        "reserved": 0,
        "first": 0,
        "count": 1,
        "length": PAGE,
        "crc": 0,
        "reserved2": 0,
    }
    return FRAME.pack(*(fields | changes).values())


WRONG_FRAMES = {
    "magic": (header(magic=0x4D48), "no frame begins with 0x4d48"),
    "flags": (header(flags=2), "frame with unknown flags 0x2"),
    "reserved": (header(reserved=1), "frame with 0x1 in its reserved bytes"),
    "kind": (header(kind=9), "frame of kind 9"),
    "a request of the source": (header(kind=REQUEST, length=0), "frame of kind 1"),
    "region": (header(region=1), "region 1 of 1"),
    "page": (header(first=COUNT), f"page {COUNT} outside region 0 ({COUNT} pages)"),
    "last page": (header(first=COUNT - 1, count=2, length=2 * PAGE), f"page {COUNT} outside region 0"),
    "page 2^64-1": (header(first=2**64 - 1), "outside region 0"),
    "count 0": (header(count=0, length=0), "a frame of 0 pages of region 0 (1 to 64 may be)"),
    "count 65": (header(count=65, length=65 * PAGE), "a frame of 65 pages of region 0 (1 to 64 may be)"),
    "count 2^32-1": (header(count=2**32 - 1), "a frame of 4294967295 pages"),
    "length short": (header(length=PAGE - 1), "4095 bytes for 1 pages of region 0 (4096 expected"),
    "length 2^32-1": (header(length=2**32 - 1), "4294967295 bytes for 1 pages"),
    "zero with payload": (header(kind=ZERO), "4096 bytes for 1 pages of region 0 (0 expected"),
    "beat with pages": (header(kind=BEAT), "a beat that names pages"),
}


@pytest.mark.parametrize(("data", "why"), WRONG_FRAMES.values(), ids=WRONG_FRAMES.keys())
@pytest.mark.parametrize("lane", ["urgent", "background"])
def test_wrong_frames(daemon: DaemonProcess, vmm: Vmm, name: str, lane: str, data: bytes, why: str) -> None:
    """They end the session, not the migration: what came before them stays, and another source brings the rest."""
    guest = b"".join(bytes([page + 1]) * PAGE for page in range(COUNT))
    with RawSource(daemon.port, name, REGIONS) as source:
        source.join().switch()
        vmm.expect("ready")
        getattr(source, lane).socket.sendall(frame(PAGES, 0, 0, 2, guest[: 2 * PAGE]) + data)
        told = source.control.expect(wire.Refused).why
        assert why in told
        assert told.startswith({"urgent": "urgent lane: ", "background": "background lane 1: "}[lane])
        assert told.endswith(": sent by the source")
    with RawSource(daemon.port, name, REGIONS, epoch=source.welcome.epoch, token=source.welcome.token) as source:
        assert source.join().welcome.switched
        assert daemon.migration(name)["pages_received"] == 2
        source.background.socket.sendall(frame(PAGES, 0, 0, COUNT, guest))
        assert source.control.expect(wire.Complete).pages == COUNT
    vmm.expect("done")
    assert vmm.content() == guest


@pytest.mark.parametrize("cut", [1, 31, 32, 33, 32 + PAGE - 1])
def test_a_frame_that_breaks_off(daemon: DaemonProcess, vmm: Vmm, name: str, cut: int) -> None:
    """A lane's end is no fault: another takes its place, and the session goes on."""
    with RawSource(daemon.port, name, REGIONS) as source:
        source.join().switch()
        vmm.expect("ready")
        whole = frame(PAGES, 0, 3, 1, b"x" * PAGE)
        source.background.socket.sendall(whole[:cut])
        source.background.close()
        source.open_lane(1).socket.sendall(whole)
        assert vmm.read(3) == b"x" * PAGE
        assert daemon.migration(name)["epoch"] == 1


def switch_before_go(source: RawSource) -> None:
    source.greet()
    source.control.send(wire.Switch(0))


def test_a_source_that_missed_the_end_is_told_it(daemon: DaemonProcess, vmm: Vmm, name: str) -> None:
    """Only that one: the name, and even the epoch, may be those of another guest by now."""
    with RawSource(daemon.port, name, REGIONS) as source:
        source.join().switch()
        vmm.expect("ready")
        source.background.socket.sendall(frame(PAGES, 0, 0, COUNT, b"x" * COUNT * PAGE))
        vmm.expect("done")  # and "complete" to the source, which does not read it
    epoch, token = source.welcome.epoch, source.welcome.token
    daemon.ended(name)
    with RawSource(daemon.port, name, REGIONS, epoch=epoch, token=token) as again:
        again.control.send(again.hello)
        assert again.control.receive() == wire.Complete(COUNT)
    for wrong_epoch, wrong_token in ((epoch + 1, token), (epoch, bytes(16)), (0, b"")):
        with RawSource(daemon.port, name, REGIONS, epoch=wrong_epoch, token=wrong_token) as other:
            other.control.send(other.hello)
            why = other.control.expect(wire.Refused).why
            assert re.fullmatch(rf"migration {name} ended here \d s ago: complete", why)


WRONG_WORDS: dict[str, tuple[Callable[[RawSource], None], str]] = {
    "switch before go": (switch_before_go, "switch while joining"),
    "zeros before the switch": (
        lambda source: source.join().control.send(wire.Zero(0, 0, b"\x00\x01")),
        "zero while switching",
    ),
    "a second hello": (lambda source: source.join().control.send(source.hello), "hello while switching"),
    "a word of the destination's": (
        lambda source: source.join().control.send(wire.Complete(9)),
        "complete while switching",
    ),
    "zeros in no region": (
        lambda source: source.join().switch().control.send(wire.Zero(1, 0, b"\x00\x01")),
        "zero pages in region 1 of 1",
    ),
    "zeros outside": (
        lambda source: source.join().switch().control.send(wire.Zero(0, COUNT, b"\x00\x01")),
        f"page {COUNT} outside a region of {COUNT} pages",
    ),
    "zeros in half a number": (
        lambda source: source.join().switch().control.send(wire.Zero(0, 0, b"\x80")),
        "cut off in the middle of a number",
    ),
    "less state than announced": (
        lambda source: source.join().control.send(wire.State(b"x"), wire.Switch(2)),
        "state of 1 bytes, 2 announced",
    ),
    "too much state": (
        lambda source: source.join().control.send(wire.State(bytes(65536)), wire.State(b"x")),
        "state of more than 65536 bytes",
    ),
    "pushed twice": (
        lambda source: source.join().switch().control.send(wire.Pushed(), wire.Pushed()),
        "pushed while pushed",
    ),
}


@pytest.mark.parametrize(("speak", "why"), WRONG_WORDS.values(), ids=WRONG_WORDS.keys())
@pytest.mark.usefixtures("vmm")
def test_wrong_words(daemon: DaemonProcess, name: str, speak: Callable[[RawSource], None], why: str) -> None:
    with RawSource(daemon.port, name, REGIONS) as source:
        speak(source)
        while isinstance(message := source.control.receive(), wire.Waiting | wire.Go):
            pass
        assert isinstance(message, wire.Refused)
        assert why in message.why
    assert daemon.migration(name)["link"] == message.why


def test_a_source_that_gives_up_is_named(daemon: DaemonProcess, vmm: Vmm, name: str) -> None:
    with RawSource(daemon.port, name, REGIONS) as source:
        source.join().control.send(wire.Failed("the disk is gone"))
        eventually(lambda: daemon.migration(name)["link"] == "the source gave up: the disk is gone")
    with RawSource(daemon.port, name, REGIONS) as source:
        source.join().switch()
        vmm.expect("ready")


@pytest.mark.usefixtures("vmm")
def test_a_silent_source_is_dropped(daemon: DaemonProcess, name: str) -> None:
    with RawSource(daemon.port, name, REGIONS) as source:
        source.join()
        with pytest.raises(LinkError):
            source.control.receive()
    assert re.search(r"silent for \d\.\d s$", daemon.migration(name)["link"])


def test_touching_without_a_source_waits_and_is_told(daemon: DaemonProcess, vmm: Vmm, name: str) -> None:
    """Whatever comes to it, this guest must not see zeros."""
    with RawSource(daemon.port, name, REGIONS) as source:
        source.join().switch()
        vmm.expect("ready")
    touch: Touch = vmm.touch(9)
    waits = eventually(lambda: daemon.migration(name)["waits"])
    assert [(wait["region"], wait["page"]) for wait in waits] == [(0, 9)]
    with RawSource(daemon.port, name, REGIONS, epoch=1, token=source.welcome.token) as source:
        source.join()
        assert source.urgent.read_frame()[:4] == (REQUEST, 0, 9, 1)
        source.urgent.socket.sendall(frame(PAGES, 0, 9, 1, b"9" * PAGE))
        assert touch.result() == b"9" * PAGE
