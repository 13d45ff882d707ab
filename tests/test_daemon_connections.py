"""Wrong bytes and wrong greetings to a daemon that serves another guest: told by name, and of no harm to that."""

import re
import socket
import struct
import time

import msgpack
import pytest
from support.connection import Connection, connect
from support.daemon import DaemonProcess
from support.neighbour import COUNT, REGIONS, SETTINGS, Neighbour
from support.polling import eventually
from support.rawsource import RawSource
from support.vmm import PAGE

from gmemd.errors import LinkError
from gmemd.migrate import wire
from gmemd.migrate.link import LinkSettings
from gmemd.native import crc32c

pytest_plugins = ["support.daemon_fixtures", "support.neighbour_fixtures"]
pytestmark = [pytest.mark.daemon(SETTINGS), pytest.mark.usefixtures("nobody_else_notices")]

RESET_ON_CLOSE = struct.pack("ii", 1, 0)


def framed(body: bytes) -> bytes:
    return wire.HEAD.pack(len(body), crc32c(body)) + body


def told_no(connection: Connection) -> str:
    """Why the daemon refused; it must hang up behind that."""
    why = connection.expect(wire.Refused).why
    with pytest.raises(LinkError, match="hung up"):
        connection.receive()
    return why


HELLO = wire.Hello("nobody", 0, b"", 1, False, REGIONS)
WRONG_BYTES = {
    "another protocol": (b"GET / HTTP/1.1\r\nHost: gmemd\r\n\r\n", "not a gmemd connection: it begins with b'GET / '"),
    "a version to come": (wire.PREAMBLE.pack(wire.MAGIC, 2) + bytes(99), "protocol version 2 (this is version 1)"),
    "a message too long": (wire.preamble() + wire.HEAD.pack(2**20, 0), "a message of 1048576 bytes (131072 at most)"),
    "no msgpack": (wire.preamble() + framed(b"\xc1"), "not msgpack"),
    "no known type": (wire.preamble() + framed(msgpack.packb({"type": "x"})), "no known type: 'x'"),
    "no name": (wire.preamble() + framed(msgpack.packb({"type": "hello"})), "hello: bad migration: None"),
    "a name with a path": (
        wire.preamble() + wire.encode(wire.Hello("../../etc", 0, b"", 1, False, REGIONS)),
        "hello: bad migration: '../../etc'",
    ),
    "no lanes": (wire.preamble() + wire.encode(wire.Hello("m", 0, b"", 0, False, REGIONS)), "hello: bad lanes: 0"),
    "no regions": (wire.preamble() + wire.encode(wire.Hello("m", 0, b"", 1, False, [])), "hello: bad regions: []"),
    "values too deep for repr()": (
        wire.preamble() + framed(b"\x81\xa4type" + b"\x91" * 1000 + b"\x00"),
        "a message of no known type",
    ),
    "the middle of a conversation": (
        wire.preamble() + wire.encode(wire.Go()),
        "a connection cannot begin with go",
    ),
}


@pytest.mark.parametrize(("data", "why"), WRONG_BYTES.values(), ids=WRONG_BYTES.keys())
def test_wrong_first_bytes(daemon: DaemonProcess, connection: Connection, data: bytes, why: str) -> None:
    connection.socket.sendall(data)
    told = told_no(connection)
    assert why in told
    assert told.endswith(": sent by the source")
    port = connection.socket.getsockname()[1]
    eventually(lambda: f"127.0.0.1:{port}: refused: {told}" in daemon.log.read_text())


@pytest.mark.parametrize("sent", [0, 1, 7, 8, 15, 16, 40])
@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_that_breaks_off(daemon: DaemonProcess, sent: int, reset: bool) -> None:
    connection = connect(daemon.port)
    connection.socket.sendall((wire.preamble() + wire.encode(HELLO))[:sent])
    if reset:
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    connection.close()


def test_a_damaged_hello_is_worth_another_try(connection: Connection) -> None:
    connection.socket.sendall(wire.preamble() + wire.encode(HELLO)[:-1] + b"\x55")
    with pytest.raises(LinkError, match="hung up"):
        connection.receive()


def test_many_that_hang_up_before_they_are_accepted(daemon: DaemonProcess) -> None:
    for _ in range(50):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            sock.connect(("127.0.0.1", daemon.port))


@pytest.mark.parametrize(
    ("regions", "why"),
    [
        ([[4096, COUNT, 12]], "region 0: gpa 4096 at the source, 0 at the VMM here"),
        ([[0, COUNT + 1, 12]], f"region 0: pages {COUNT + 1} at the source, {COUNT} at the VMM here"),
        ([[0, COUNT, 21]], "region 0: page shift 21 at the source, 12 at the VMM here"),
        ([*REGIONS, [65536, 1, 12]], "2 regions at the source, 1 at the VMM here"),
    ],
)
@pytest.mark.usefixtures("vmm")
def test_other_memory(connection: Connection, name: str, regions: list[list[int]], why: str) -> None:
    connection.send(wire.Hello(name, 0, b"", 1, False, regions))
    assert told_no(connection) == why


@pytest.mark.usefixtures("vmm")
def test_an_epoch_from_the_future(connection: Connection, name: str) -> None:
    connection.send(wire.Hello(name, 7, bytes(16), 1, False, REGIONS))
    assert told_no(connection) == "epoch 7 is in the future (now is 0): sent by the source"


def test_a_second_source(connection: Connection, neighbour: Neighbour) -> None:
    connection.send(wire.Hello("neighbour", 0, b"", 1, False, [[0, len(neighbour.content) // PAGE, 12]]))
    assert re.fullmatch(r"migration neighbour has a source already: 127\.0\.0\.1:\d+", told_no(connection))


@pytest.mark.usefixtures("vmm")
def test_a_source_that_was_replaced(daemon: DaemonProcess, name: str) -> None:
    with RawSource(daemon.port, name, REGIONS) as first:
        first.greet()
    with (
        RawSource(daemon.port, name, REGIONS) as second,
        RawSource(daemon.port, name, REGIONS, epoch=1, token=first.welcome.token) as again,
    ):
        assert second.greet().epoch == 2
        again.control.send(again.hello)
        for _ in range(6):  # the second lives
            second.control.send(wire.Beat())
            time.sleep(0.25)
        assert told_no(again.control) == "epoch 1 is over (now is 2): another source took its place"
    with RawSource(daemon.port, name, REGIONS, epoch=1, token=first.welcome.token) as again:
        assert again.greet().epoch == 3, "nobody else is there, and it has the same memory"


@pytest.mark.usefixtures("vmm")
def test_a_source_that_missed_its_welcome(daemon: DaemonProcess, name: str) -> None:
    """It can say nothing newer than it knows; the session that it does not know of makes room at once."""
    with RawSource(daemon.port, name, REGIONS) as first:
        first.greet()
    token = first.welcome.token
    with (
        RawSource(daemon.port, name, REGIONS, epoch=1, token=token) as second,
        RawSource(daemon.port, name, REGIONS, epoch=1, token=token) as third,
    ):
        assert second.greet().epoch == 2
        begin = time.monotonic()
        assert third.greet().epoch == 3
        assert time.monotonic() - begin < LinkSettings().heartbeat


LANE = wire.LaneHello("nobody", 1, 0, bytes(wire.TOKEN_BYTES))


def test_a_lane_of_no_migration(connection: Connection) -> None:
    connection.send(LANE)
    assert told_no(connection) == "lane 0: no migration nobody here"


@pytest.mark.usefixtures("vmm")
@pytest.mark.parametrize("wrong", ["token", "lane", "epoch"])
def test_a_lane_of_another_session(daemon: DaemonProcess, connection: Connection, name: str, wrong: str) -> None:
    with RawSource(daemon.port, name, REGIONS) as source:
        welcome = source.greet()
        token = bytes([welcome.token[0] ^ 1]) + welcome.token[1:] if wrong == "token" else welcome.token
        lane, epoch = 2 if wrong == "lane" else 1, 2 if wrong == "epoch" else welcome.epoch
        connection.send(wire.LaneHello(name, epoch, lane, token))
        expected = {
            "token": "lane 1 is none of this session's: sent by the source",
            "lane": "lane 2 is none of this session's: sent by the source",
            "epoch": "lane 1: epoch 2 is over: sent by the source",
        }
        assert told_no(connection) == expected[wrong]
        source.open_lane(0)
        source.open_lane(1)
        source.control.expect(wire.Go)
