"""Real daemons and sources with lists of revoked certificates: who gets through, and what both say of who does not."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from support.daemon import DaemonProcess
from support.polling import PATIENCE, eventually
from support.revocation import OLD, PAST, revoked
from support.source import Result, SourceProcess
from support.vmm import PAGE, Vmm

from gmemd_tools.demo.certificates import Authority, Identity

pytest_plugins = ["support.daemon_fixtures"]


class World(NamedTuple):
    """An authority, both hosts, and lists on which there is nobody, the source, the daemon; and one too old."""

    src: Identity
    dst: Identity
    nobody: Path
    no_src: Path
    no_dst: Path
    expired: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("ca")
    ca = Authority(folder)
    src, dst = ca.issue("src", "DNS:src.example"), ca.issue("dst", "IP:127.0.0.1")
    return World(
        src,
        dst,
        revoked(folder / "nobody", ca, when=OLD),
        revoked(folder / "no src", ca, src.certificate),
        revoked(folder / "no dst", ca, dst.certificate),
        revoked(folder / "expired", ca, when=PAST),
    )


def settings(own: Identity, crl: Path) -> str:
    files = "".join(f'{key} = "{path}"\n' for key, path in (own._asdict() | {"crl": crl}).items())
    return f'[tls]\npeers = ["src.example"]\n{files}'


def send(daemon: DaemonProcess, name: str, memory: Path, own: Identity, crl: Path) -> SourceProcess:
    files = (own._asdict() | {"crl": crl}).items()
    return SourceProcess(daemon.port, name, "--file", memory, options=tuple(f"--{key}={path}" for key, path in files))


def refused(source: SourceProcess) -> str:
    with source:
        result: Result = source.result()
    assert result.code == os.EX_NOPERM
    return result.errors.splitlines()[-1].partition(": ")[2]


def replaced(crl: Path, by: Path) -> None:
    new = crl.with_suffix(".new")
    new.write_bytes(by.read_bytes())
    os.replace(new, crl)


def test_lists(world: World, tmp_path: Path, content: bytes) -> None:
    """A pair goes through as long as neither is on the other's list; the daemon's is read again when it changes."""
    crl, memory = tmp_path / "crl.pem", tmp_path / "memory"
    crl.write_bytes(world.nobody.read_bytes())
    (tmp_path / "daemon").mkdir()
    with DaemonProcess(tmp_path / "daemon", settings(world.dst, crl)) as daemon:
        at = re.escape(f"127.0.0.1:{daemon.port}: TLS: ")

        def told(pattern: str) -> bool:
            return re.search(rf"(?m)^gmemd: {pattern}", daemon.log.read_text()) is not None

        with Vmm(len(content)) as vmm, send(daemon, "good", memory, world.src, world.nobody) as source:
            vmm.hand_off(daemon.socket, "good").expect("ready")
            assert vmm.read(0, pages=len(content) // 4096) == content
            assert source.result().code == 0
            vmm.expect("done")
        assert told('TLS: we refuse revoked certificates of "CN=gmemd ca", valid ')

        replaced(crl, world.no_src)
        why = refused(send(daemon, "m", memory, world.src, world.nobody))
        assert re.fullmatch(f"{at}it refuses us: certificate revoked", why)
        eventually(lambda: told(r'warning: 127\.0\.0\.1:\d+: refused: TLS: certificate revoked: certificate "CN=src"'))

        replaced(crl, world.expired)
        why = refused(send(daemon, "m", memory, world.src, world.nobody))
        assert re.fullmatch(f"{at}it refuses us: certificate unknown: its own log says why", why)
        assert told("warning: nobody who shows a certificate is let in by a list that has expired: revoked ")
        eventually(lambda: told(r"warning: .*: refused: TLS: our list of what its issuer has revoked has expired: "))

        crl.write_text("nonsense")
        why = refused(send(daemon, "m", memory, world.src, world.no_dst))
        assert re.fullmatch(rf'{at}certificate revoked: certificate "CN=dst", .*', why)
        eventually(lambda: told(r"warning: .*: refused: TLS: it refuses us: certificate revoked"))
        place = re.escape(f'{daemon.config}: [tls] crl = "{crl}": not a list of revoked certificates in PEM')
        assert told(f"error: the old certificates and keys stay: {place}")
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log.read_text()


def test_a_new_list_counts_though_another_file_is_wrong(world: World, tmp_path: Path) -> None:
    crl, key, memory = tmp_path / "crl.pem", tmp_path / "key.pem", tmp_path / "memory"
    crl.write_bytes(world.nobody.read_bytes())
    key.touch(0o600)
    key.write_bytes(world.dst.key.read_bytes())
    memory.write_bytes(bytes(PAGE))
    (tmp_path / "daemon").mkdir()
    with DaemonProcess(tmp_path / "daemon", settings(world.dst._replace(key=key), crl)) as daemon:
        key.chmod(0o644)
        replaced(crl, world.no_src)
        why = refused(send(daemon, "m", memory, world.src, world.nobody))
        assert why == f"127.0.0.1:{daemon.port}: TLS: it refuses us: certificate revoked"
        assert f'the old certificates and keys stay: {daemon.config}: [tls] key = "{key}": ' in daemon.log.read_text()
        assert daemon.stop() == 0


def run(*words: str | Path) -> Sequence[object]:
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=PATIENCE)
    return done.returncode, done.stderr


def test_a_list_that_cannot_be_read(world: World, tmp_path: Path) -> None:
    """Nothing is started, at either end."""
    config, missing = tmp_path / "gmemd.toml", tmp_path / "missing.pem"
    sockets = f'[daemon]\nsocket = "{tmp_path}/a"\nstatus_socket = "{tmp_path}/b"\n'
    config.write_text(f'{sockets}[network]\nlisten = "127.0.0.1:0"\n{settings(world.dst, missing)}')
    told = f'gmemd: {config}: [tls] crl = "{missing}": No such file or directory\n'
    assert run("gmemd.cli", "serve", "--config", config) == (os.EX_CONFIG, told)
    files = (world.src._asdict() | {"crl": missing}).items()
    options = ("--migration=m", "--file=/dev/null", *(f"--{key}={path}" for key, path in files))
    told = f"gmemd-source: --crl {missing}: No such file or directory\n"
    assert run("gmemd.source_cli", "127.0.0.1:1", *options) == (os.EX_CONFIG, told)
