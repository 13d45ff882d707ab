"""A daemon with a wrong configuration for which guests are kept: it waits, quietly, until that is mended."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.daemon import HAND_IN, Manager
from support.polling import PATIENCE, eventually

from gmemd import mending

KEPT = "fd0.m:vmm.m:state.m"


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path / "notify")
    yield manager
    manager.close()


@contextmanager
def waiting(config: Path, manager: Manager) -> Iterator["subprocess.Popen[str]"]:
    """Once it has told what it waits for."""
    fds = [os.memfd_create(name) for name in KEPT.split(":")]
    process = subprocess.Popen(
        [sys.executable, "-c", HAND_IN, *map(str, fds), "--config", str(config)],
        env=os.environ | {"LISTEN_FDNAMES": KEPT, "NOTIFY_SOCKET": str(manager.path)},
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=fds,
    )
    try:
        eventually(lambda: any(line.startswith("STATUS=") for line in manager.told) or process.poll() is not None)
        assert process.poll() is None
        yield process
    finally:
        process.kill()
        process.communicate()
        for fd in fds:
            os.close(fd)


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_until_the_file_is_mended(tmp_path: Path, manager: Manager) -> None:
    config = tmp_path / "gmemd.toml"
    config.write_text("[netwrok]\n")
    with waiting(config, manager) as process:
        assert process.stderr
        line = process.stderr.readline()
        why = re.escape(f"{config}: netwrok: no such table; the nearest is [network]; guests are kept for us: ")
        assert re.fullmatch(f"gmemd: {why}waits until that is mended.*\n", line)
        assert f"STATUS={line.removeprefix('gmemd: ').rstrip()}" in manager.told
        before = cpu_ticks(process.pid)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        assert cpu_ticks(process.pid) - before < 15, "of 50"
        config.write_text("[network]\n")
        assert process.wait(PATIENCE) == os.EX_UNAVAILABLE
        assert process.stderr.read() == ""
    assert "READY=1" not in manager.told


def test_until_a_file_that_it_names_is_mended(tmp_path: Path, manager: Manager) -> None:
    """And found wrong only when sources are about to be let in: the address is free again for whoever comes next."""
    config, psk = tmp_path / "gmemd.toml", tmp_path / "psk"
    psk.write_text(f"pair:{'00' * 16}\n")
    psk.chmod(0o644)
    sockets = f'[daemon]\nsocket = "{tmp_path}/a"\nstatus_socket = "{tmp_path}/b"\n'
    config.write_text(f'{sockets}[network]\nlisten = "127.0.0.1:0"\n[tls]\npeers = ["*"]\npsk = "{psk}"\n')
    with waiting(config, manager) as process:
        assert process.stderr
        assert f'{config}: [tls] psk = "{psk}": mode 0644' in process.stderr.readline()
        fds = Path(f"/proc/{process.pid}/fd")
        eventually(lambda: not [fd for fd in fds.iterdir() if "socket" in os.readlink(fd)], 5)
        psk.chmod(0o600)
        assert process.wait(PATIENCE) == os.EX_UNAVAILABLE


def test_until_the_address_is_another(tmp_path: Path, manager: Manager) -> None:
    config = tmp_path / "gmemd.toml"
    sockets = f'[daemon]\nsocket = "{tmp_path}/a"\nstatus_socket = "{tmp_path}/b"\n'
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config.write_text(f'{sockets}[network]\nlisten = "127.0.0.1:{port}"\n')
        with waiting(config, manager) as process:
            assert process.stderr
            line = f"gmemd: cannot listen on 127.0.0.1:{port}: Address already in use; guests are kept for us: "
            assert process.stderr.readline().startswith(line)
            begun = time.monotonic()
            config.write_text(f'{sockets}[network]\nlisten = "127.0.0.1:0"\n')
            assert process.wait(PATIENCE) == os.EX_UNAVAILABLE
            assert time.monotonic() - begun < mending.SOON - 1.0, "it did not wait for that to pass by itself"


def test_a_signal_ends_it_at_once(tmp_path: Path, manager: Manager) -> None:
    with waiting(tmp_path / "nowhere.toml", manager) as process:
        process.terminate()
        assert process.wait(PATIENCE) == -signal.SIGTERM
