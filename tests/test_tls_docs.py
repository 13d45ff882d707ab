"""The commands of docs/tls.md, run as they stand there, and what they make, used; and a demo with TLS that breaks."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.daemon import DaemonProcess
from support.source import SourceProcess
from support.vmm import Vmm

pytest_plugins = ["support.daemon_fixtures"]

DOCUMENT = Path(__file__).parents[1] / "docs/tls.md"


def commands() -> list[str]:
    """Those that make something; the others need a second host."""
    blocks: list[str] = re.findall(r"```sh\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    return [block for block in blocks if "gmemd-source" not in block]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Everything that the commands make."""
    folder = tmp_path / "made"
    folder.mkdir()
    for block in commands():
        subprocess.run(["sh", "-eu", "-c", block], cwd=folder, check=True, capture_output=True)
    return folder


def test_what_the_commands_make_is_good(folder: Path, tmp_path: Path, content: bytes) -> None:
    """The certificate has usages and names for both ends here, and the key is one that a pair has."""
    made = {"certificate": "host1.crt", "key": "host1.key", "ca": "ca.crt", "crl": "crl.pem"}
    files = "".join(f'{key} = "{folder}/{name}"\n' for key, name in made.items())
    peers = 'peers = ["host1.example", "host1-host2"]\n'
    certificate = tuple(f"--{key}={folder}/{name}" for key, name in made.items())
    (tmp_path / "daemon").mkdir()
    with DaemonProcess(tmp_path / "daemon", f'[tls]\n{files}psk = "{folder}/psk"\n{peers}') as daemon:
        for name, options in (("certificate", certificate), ("key", (f"--psk={folder}/psk",))):
            with (
                Vmm(len(content)) as vmm,
                SourceProcess(daemon.port, name, "--file", tmp_path / "memory", options=options) as source,
            ):
                vmm.hand_off(daemon.socket, name).expect("ready")
                assert source.result().code == 0
                assert vmm.read(0, pages=len(content) // 4096) == content
                vmm.expect("done")


def test_a_demo_over_tls_that_breaks() -> None:
    """The link is cut and the daemon killed: all lanes come back, with TLS."""
    faults = ("--inject=link-cut@30", "--inject=daemon-kill@60")
    command = (sys.executable, "-m", "gmemd.cli", "demo", "--tls", "--json", "--memory=64M", *faults)
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    told = json.loads(run.stdout)
    assert (told["ok"], told["tls"], told["mismatches"]) == (True, "TLSv1.3", 0), run.stderr
    assert told["recoveries"] >= 2
