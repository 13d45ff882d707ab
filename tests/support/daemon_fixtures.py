"""A daemon for all tests of a module, and a small guest memory. To be named in `pytest_plugins`.

A module that marks itself `daemon(SETTINGS)` has them in the daemon's configuration.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import DaemonProcess
from support.source import COUNT, guest_content


@pytest.fixture(scope="module")
def daemon(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    marker = request.node.get_closest_marker("daemon")
    with DaemonProcess(tmp_path_factory.mktemp("daemon"), marker.args[0] if marker else "") as daemon:
        yield daemon
        assert daemon.stop() == 0, daemon.log.read_text()
        assert "Traceback" not in daemon.log.read_text()


@pytest.fixture
def content(tmp_path: Path, rng: random.Random) -> bytes:
    """What the guest has, in `tmp_path`/memory, too."""
    content = guest_content(rng, COUNT)
    (tmp_path / "memory").write_bytes(content)
    return content
