"""What a daemon tells of its migrations, and how one is given up."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.connection import PAGES, frame
from support.daemon import DaemonProcess
from support.polling import PATIENCE, eventually
from support.rawsource import RawSource
from support.source import COUNT, SourceProcess
from support.vmm import PAGE, Vmm

pytest_plugins = ["support.daemon_fixtures"]

REGIONS = [[0, COUNT, 12]]


def test_given_up_by_an_operator(daemon: DaemonProcess, tmp_path: Path, content: bytes) -> None:
    command = [sys.executable, "-m", "gmemd.cli", "abandon", "--socket", str(daemon.status_socket), "given-up"]
    options = ("--no-background",)
    with (
        Vmm(len(content)) as vmm,
        SourceProcess(daemon.port, "given-up", "--file", tmp_path / "memory", options=options) as source,
    ):
        vmm.hand_off(daemon.socket, "given-up").expect("ready")
        assert vmm.read(1) == content[PAGE : 2 * PAGE]
        waiting = daemon.migration("given-up")["pages"] - daemon.migration("given-up")["pages_received"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert (run.returncode, run.stdout) == (os.EX_UNAVAILABLE, "")
        assert f"its source is here with the {waiting} pages that are missing; --force" in run.stderr
        assert daemon.migration("given-up")["phase"] == "running"
        run = subprocess.run([*command, "--force"], capture_output=True, text=True, timeout=PATIENCE)
        assert (run.returncode, run.stdout) == (0, f"given-up is given up; {waiting} pages were missing\n")
        assert vmm.receive() == {"abandoned": "given up by an operator"}
        assert vmm.receive() == {}
        code, _, errors = source.result()
        assert code == os.EX_UNAVAILABLE
        assert errors.endswith("given up: given up by an operator\n")
    run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (run.returncode, run.stderr) == (os.EX_UNAVAILABLE, "gmemd: no migration 'given-up' here\n")


def test_a_source_whose_vmm_has_not_come(daemon: DaemonProcess, tmp_path: Path, content: bytes) -> None:
    """Both ends say so: one of the two may have the wrong name."""
    memory = tmp_path / "memory"
    memory.write_bytes(content)
    with SourceProcess(daemon.port, "mistyped", "--file", memory, options=("--verbose",)) as source:
        (waiting,) = eventually(lambda: daemon.status()["waiting"])
        assert waiting["migration"] == "mistyped"
        assert f"migration mistyped: source {waiting['source']} waits for its VMM" in daemon.log.read_text()
        command = [sys.executable, "-m", "gmemd.cli", "status", "--socket", str(daemon.status_socket)]
        told = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert told.stdout.startswith("mistyped: no VMM has come, and a source waits for it: 127.0.0.1:")
        assert source.process.stderr
        assert source.process.stderr.readline().endswith(": waits for the VMM of migration mistyped there\n")
    eventually(lambda: not daemon.status()["waiting"])


def test_status_tells_what_there_is(daemon: DaemonProcess, rng: random.Random) -> None:
    content = rng.randbytes(COUNT * PAGE)
    with Vmm(len(content)) as vmm, RawSource(daemon.port, "told", REGIONS) as source:
        vmm.hand_off(daemon.socket, "told")
        source.join().switch(b"state")
        vmm.expect("ready")
        source.background.socket.sendall(frame(PAGES, 0, 0, 16, content[: 16 * PAGE]))
        touch = vmm.touch(20)
        assert source.urgent.read_frame()[:4] == (1, 0, 20, 1)
        eventually(lambda: daemon.migration("told")["pages_received"] == 16)
        told = daemon.migration("told")
        assert [(wait["region"], wait["page"]) for wait in told["waits"]] == [(0, 20)]
        assert told["waits"][0]["for_us"] > 0
        expected = {
            "migration": "told",
            "phase": "running",
            "memory_bytes": len(content),
            "pages": COUNT,
            "epoch": 1,
            "lanes": [0, 1],
            "recoveries": 0,
            "stuck": None,
            "link": None,
        }
        assert told | expected == told
        assert told["counters"]["faults"] == 1
        assert told["counters"]["background_pages"] == 16
        source.urgent.socket.sendall(frame(PAGES, 0, 20, 1, content[20 * PAGE : 21 * PAGE]))
        assert touch.result() == content[20 * PAGE : 21 * PAGE]
        assert daemon.migration("told")["waits"] == []
        assert daemon.migration("told")["fault_latency_us"]["max"] > 0
        source.background.socket.sendall(frame(PAGES, 0, 0, 64, content))
        vmm.expect("done")
        assert vmm.content() == content
        assert daemon.ended("told")["phase"] == "complete"


@pytest.mark.parametrize(
    ("request_line", "answer"),
    [
        (b"{}", "not a request"),
        (b"[]", "not a request"),
        (b"\xff", "not a request"),
        (b"[" * 4000, "not a request"),
        (b'{"command": "dance"}', "no such command: 'dance'"),
        (b'{"command": ' + b"[" * 900 + b"]" * 900 + b"}", "no such command: [[["),
        (b'{"command": "abandon"}', "no migration None here"),
        (b'{"command": "abandon", "migration": "x"}', "no migration 'x' here"),
        (b"x" * 5000, "not a request"),
    ],
)
def test_bad_requests_for_status(daemon: DaemonProcess, request_line: bytes, answer: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(str(daemon.status_socket))
        sock.sendall(request_line + b"\n")
        with sock.makefile("rb") as file:
            told = json.loads(file.readline())
    assert told["error"].startswith(answer)


def test_who_asks_for_status_and_says_nothing_is_no_trouble(daemon: DaemonProcess) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(daemon.status_socket))
        assert daemon.status()["migrations"] == []
