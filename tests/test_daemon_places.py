"""Sources that come, and say little or nothing: each holds no more than its part, and not for ever."""

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.connection import Connection
from support.daemon import DaemonProcess
from support.polling import PATIENCE, eventually
from support.rawsource import RawSource
from support.vmm import PAGE, Vmm

from gmemd.errors import LinkError
from gmemd.migrate import wire
from gmemd.places import Places

REGIONS = [[0, 16, 12]]
# Of memory for a message of 128 KiB that is not whole: a buffer that grows, and what it grew from.
MESSAGE_KIB = 4 * wire.MAX_MESSAGE // 1024
IN_ALL, OF_PEER, TIMEOUT = 16, 10, 0.5
SETTINGS = f"""max_connections = {IN_ALL}
max_connections_of_peer = {OF_PEER}
handshake_timeout = {TIMEOUT}
"""
HELLO = wire.Hello("nobody", 0, b"", 1, False, REGIONS)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path, SETTINGS) as daemon:
        yield daemon
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log.read_text()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def connect_from(stack: ExitStack, host: str, daemon: DaemonProcess) -> Connection:
    """As another host of the loopback network."""
    sock = socket.create_connection(("127.0.0.1", daemon.port), PATIENCE, source_address=(host, 0))
    connection = Connection(sock, "destination")
    stack.callback(connection.close)
    return connection


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this kernel has no IPv6")
def test_sources_by_either_protocol(tmp_path: Path, stack: ExitStack) -> None:
    """On [::], where those that come by IPv4 have addresses like those of IPv6, and are known by their own."""
    settings = 'tls = "off"\nplain_text_on_network = true\nmax_connections_of_peer = 1\n'
    with DaemonProcess(tmp_path, settings, listen="[::]:0") as daemon:
        names = []
        for host, name in (("127.0.0.1", "127.0.0.1:{}"), ("::1", "[::1]:{}")):
            sock = socket.create_connection((host, daemon.port), PATIENCE)
            names.append(name.format(sock.getsockname()[1]))
            connection = Connection(sock, "destination")
            stack.callback(connection.close)
            assert waits(connection), "each is a peer of its own"
        assert [each["source"] for each in daemon.status()["waiting"]] == names
        with socket.create_connection(("127.0.0.1", daemon.port), PATIENCE) as another:
            assert another.recv(1) == b""
        assert daemon.stop() == 0
        log = daemon.log.read_text()
    assert [f"source {name} waits for its VMM" in log for name in names] == [True, True]
    assert "gmemd: warning: 127.0.0.1: too many connections\n" in log


def waits(connection: Connection) -> bool:
    """Whether it is told to wait for its VMM; else the daemon hangs up."""
    connection.send(HELLO)
    try:
        connection.expect(wire.Waiting)
    except LinkError:
        return False
    return True


def test_places() -> None:
    places = Places(3, 2)
    with places.taken("a") as first, places.taken("a") as second, places.taken("a") as third:
        assert (first, second, third) == (True, True, False)
        with places.taken("b") as fourth, places.taken("c") as fifth:
            assert (fourth, fifth) == (True, False)
        with places.taken("c") as fifth:
            assert fifth
    with places.taken("a") as first, places.taken("a") as second:
        assert (first, second) == (True, True)


def test_sources_of_unknown_migrations_leave_places(daemon: DaemonProcess, stack: ExitStack) -> None:
    hosts = [f"127.0.0.{2 + n % 3}" for n in range(IN_ALL // 2 + 1)]
    assert [waits(connect_from(stack, host, daemon)) for host in hosts] == [True] * (IN_ALL // 2) + [False]
    with Vmm(16 * PAGE) as vmm:
        vmm.hand_off(daemon.socket, "good")
        eventually(lambda: daemon.status()["migrations"])
        with RawSource(daemon.port, "good", REGIONS) as source:
            source.join().switch()
            vmm.expect("ready")
        daemon.abandon("good")


def test_a_host_that_says_nothing_leaves_places(daemon: DaemonProcess, stack: ExitStack) -> None:
    for _ in range(OF_PEER):
        connect_from(stack, "127.0.0.2", daemon)
    one_more = connect_from(stack, "127.0.0.2", daemon)
    with pytest.raises(LinkError, match="hung up"):
        one_more.receive()
    assert waits(connect_from(stack, "127.0.0.3", daemon))
    assert "127.0.0.2: too many connections" in daemon.log.read_text()


@pytest.mark.parametrize("sent", [b"", wire.preamble(), wire.preamble() + struct.pack("<II", 1000, 0) + bytes(500)])
def test_silence_is_not_waited_for(daemon: DaemonProcess, stack: ExitStack, sent: bytes) -> None:
    connection = connect_from(stack, "127.0.0.2", daemon)
    connection.socket.sendall(sent)
    begin = time.monotonic()
    with pytest.raises(LinkError, match="hung up"):
        connection.receive()
    assert time.monotonic() - begin < 10 * TIMEOUT


def test_a_byte_now_and_then_is_not_waited_for(daemon: DaemonProcess, stack: ExitStack) -> None:
    """The time is for the whole hello."""
    connection = connect_from(stack, "127.0.0.2", daemon)
    connection.socket.settimeout(TIMEOUT / 10)
    begin = time.monotonic()
    with pytest.raises((LinkError, BrokenPipeError, ConnectionResetError)):  # noqa: PT012
        for byte in wire.preamble() + struct.pack("<II", wire.MAX_MESSAGE, 0) + bytes(wire.MAX_MESSAGE):
            connection.socket.sendall(bytes([byte]))
            try:
                connection.receive()
            except TimeoutError:
                continue
    assert time.monotonic() - begin < 10 * TIMEOUT


def test_what_a_stranger_can_make_the_daemon_hold(daemon: DaemonProcess, stack: ExitStack) -> None:
    """All places, each with the longest message that lacks one byte."""
    with RawSource(daemon.port, "nobody", REGIONS) as source:  # so that everything is imported
        source.control.send(source.hello)
        source.control.expect(wire.Waiting)
    before = daemon.memory_kib()["VmHWM"]
    begun = wire.preamble() + struct.pack("<II", wire.MAX_MESSAGE, 0) + bytes(wire.MAX_MESSAGE - 1)
    for n in range(IN_ALL):
        connect_from(stack, f"127.0.0.{2 + n % 2}", daemon).socket.sendall(begun)
    for n in range(IN_ALL):
        with pytest.raises(LinkError, match="hung up"):
            connect_from(stack, f"127.0.0.{2 + n % 2}", daemon).receive()
    assert daemon.memory_kib()["VmHWM"] - before < IN_ALL * MESSAGE_KIB
