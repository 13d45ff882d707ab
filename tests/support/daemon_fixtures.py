"""A daemon for all tests of a module, and a small guest memory. To be named in `pytest_plugins`."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import DaemonProcess
from support.source import COUNT, guest_content


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("daemon")) as daemon:
        yield daemon
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log.read_text()


@pytest.fixture
def content(tmp_path: Path, rng: random.Random) -> bytes:
    """What the guest has, in `tmp_path`/memory, too."""
    content = guest_content(rng, COUNT)
    (tmp_path / "memory").write_bytes(content)
    return content
