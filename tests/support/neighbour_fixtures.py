"""What a daemon that serves one guest is given while tests do it wrong. Named in `pytest_plugins` behind
support.daemon_fixtures.

After a test that uses `nobody_else_notices`, the neighbour's guest gets a page, from the session that it had before,
and the daemon has no more descriptors than it had.
"""

import random
import zlib
from collections.abc import Iterator
from contextlib import suppress

import pytest

from gmemd.errors import UnavailableError
from support.connection import Connection, connect
from support.daemon import DaemonProcess
from support.neighbour import COUNT, Neighbour
from support.polling import eventually
from support.source import SourceProcess, guest_content
from support.vmm import PAGE, Vmm


@pytest.fixture(scope="module")
def neighbour(daemon: DaemonProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neighbour]:
    content = guest_content(random.Random(5), 400)
    path = tmp_path_factory.mktemp("neighbour") / "memory"
    path.write_bytes(content)
    options = ("--no-background", "--verbose")
    with Vmm(len(content)) as vmm, SourceProcess(daemon.port, "neighbour", "--file", path, options=options) as source:
        vmm.hand_off(daemon.socket, "neighbour").expect("ready")
        neighbour = Neighbour(vmm, content)
        yield neighbour
        neighbour.gets_the_rest()
        _, told, said = source.result()
        # A host that lets either end wait for so long is no fault of theirs.
        assert told["recoveries"] == 0 or "silent for" in said + daemon.log.read_text(), said


@pytest.fixture
def nobody_else_notices(daemon: DaemonProcess, neighbour: Neighbour) -> Iterator[None]:
    before = daemon.descriptors()
    yield
    neighbour.gets_a_page()
    eventually(lambda: daemon.descriptors() <= before)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """Of a migration that no other test has."""
    return f"m{zlib.crc32(request.node.nodeid.encode())}"


@pytest.fixture
def vmm(request: pytest.FixtureRequest, daemon: DaemonProcess, name: str) -> Iterator[Vmm]:
    request.getfixturevalue("nobody_else_notices")  # looks when this guest is gone
    with Vmm(COUNT * PAGE) as vmm:
        vmm.hand_off(daemon.socket, name)
        eventually(lambda: any(m["migration"] == name for m in daemon.status()["migrations"]))
        yield vmm
        with suppress(UnavailableError):  # it has ended
            daemon.abandon(name)
        daemon.ended(name)


@pytest.fixture
def connection(daemon: DaemonProcess) -> Iterator[Connection]:
    connection = connect(daemon.port)
    yield connection
    connection.close()
