"""TLS on a host that cannot make a session just now: it says so, and goes on when it can."""

import subprocess
import time
from pathlib import Path

import pytest
from support.daemon import DaemonProcess
from support.polling import eventually
from support.source import SourceProcess
from support.vmm import Vmm

from gmemd_tools.demo.certificates import Authority, Identity

pytest_plugins = ["support.daemon_fixtures"]

CODE = Path(__file__).parent / "support/no_session.c"
WHY = "TLS: Cannot allocate memory"


@pytest.fixture
def preloaded(tmp_path: Path) -> tuple[str, ...]:
    """A command that runs another with no_session.c in it; `tmp_path / "short"` is the file that switches it on."""
    library = tmp_path / "no_session.so"
    flags = ("-shared", "-fPIC", "-Wall", "-Werror", "-Wl,--no-as-needed")
    subprocess.run(["gcc", *flags, "-o", library, CODE, "-lssl"], check=True)
    return ("env", f"LD_PRELOAD={library}", f"NO_SESSION={tmp_path / 'short'}")


@pytest.fixture
def identities(tmp_path: Path) -> tuple[Identity, Identity]:
    (tmp_path / "ca").mkdir()
    authority = Authority(tmp_path / "ca")
    return authority.issue("src", "DNS:src.example"), authority.issue("dst", "IP:127.0.0.1")


def settings(own: Identity) -> str:
    files = "".join(f'{key} = "{path}"\n' for key, path in own._asdict().items())
    return f'[tls]\npeers = ["src.example"]\n{files}'


@pytest.mark.parametrize("short_of_it", ["daemon", "source"])
def test_no_memory_for_a_session(
    short_of_it: str, tmp_path: Path, content: bytes, preloaded: tuple[str, ...], identities: tuple[Identity, Identity]
) -> None:
    """The connection is lost, and nothing else: the source tries until there is some."""
    src, dst = identities
    short = tmp_path / "short"
    short.touch()
    options = (*(f"--{key}={path}" for key, path in src._asdict().items()), "--verbose")
    prefix = {short_of_it: preloaded}
    log = tmp_path / "daemon/daemon.log"
    log.parent.mkdir()
    with (
        DaemonProcess(log.parent, settings(dst), prefix=prefix.get("daemon")) as daemon,
        Vmm(len(content)) as vmm,
        SourceProcess(
            daemon.port, "m", "--file", tmp_path / "memory", options=options, prefix=prefix.get("source", ())
        ) as source,
    ):
        vmm.hand_off(daemon.socket, "m")
        if short_of_it == "daemon":
            eventually(lambda: f": {WHY}\n" in log.read_text())
        else:
            told = source.process.stderr
            assert told
            begun = time.monotonic()
            while WHY not in (line := told.readline()):
                assert line, "it has ended"
                assert time.monotonic() - begun < 10
            assert line.endswith(f"127.0.0.1:{daemon.port}: cannot connect: {WHY}\n")
        short.unlink()
        vmm.expect("ready")
        assert vmm.read(0, pages=len(content) // 4096) == content
        vmm.expect("done")
        assert source.result().code == 0
        assert daemon.stop() == 0
    text = log.read_text()
    assert "bug" not in text
    assert text.count(WHY) == (short_of_it == "daemon"), "it is told once a minute"
