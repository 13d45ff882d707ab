"""The process that keeps descriptors: as many as it may, and what cannot be taken is told."""

import os
import re
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gmemd.errors import UnavailableError
from gmemd.holder import take_back

KEPT = 200
FEW = 64
DAEMON = """
import os, resource, socket, sys
from pathlib import Path
from gmemd.holder import take_back

path, count = sys.argv[1:]
alive, _ = take_back(Path(path))
# So many may be on their way, too.
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
with open(os.devnull) as file, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
    out.connect(path)
    for _ in range(int(count)):
        socket.send_fds(out, [b"FDSTORE=1\\nFDNAME=many"], [file.fileno()])
"""


def holder(path: Path) -> Path:
    """A holder that a daemon that may have few descriptors has started, and has given many."""
    command = ["prlimit", f"--nofile={FEW}:", sys.executable, "-c", DAEMON, str(path), str(KEPT)]
    subprocess.run(command, check=True)
    return path


def end(path: Path) -> None:
    """Whoever keeps nothing ends."""
    daemon, kept = take_back(path)
    with daemon, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        for fd in kept["many"]:
            os.close(fd)
        out.connect(str(path))
        out.send(b"FDSTOREREMOVE=1\nFDNAME=many")
    assert len(kept["many"]) == KEPT


def test_one_daemon_at_a_time(tmp_path: Path) -> None:
    path = holder(tmp_path / "holder")
    for _ in range(20):  # the one before has hung up, whether or not the holder has looked
        first, kept = take_back(path, alone=True)
        with first:
            for fd in kept["many"]:
                os.close(fd)
            with pytest.raises(UnavailableError, match="the daemon that has this --fd-store still lives"):
                take_back(path, alone=True)
    end(path)


def test_where_no_holder_can_be(tmp_path: Path) -> None:
    """What an operator has put there by mistake stays."""
    (tmp_path / "file").write_text("precious")
    places = {
        tmp_path / "file": "Address already in use",
        tmp_path: "Address already in use",
        tmp_path / "nowhere/holder": "No such file or directory",
        tmp_path / ("long" * 30): "AF_UNIX path too long",
    }
    for path, why in places.items():
        with pytest.raises(UnavailableError, match=f"^{re.escape(str(path))}: no holder of descriptors: {why}$"):
            take_back(path)
    assert (tmp_path / "file").read_text() == "precious"


def test_it_keeps_more_than_the_soft_limit(tmp_path: Path) -> None:
    end(holder(tmp_path / "holder"))


def test_a_daemon_that_may_not_open_them_all_says_so_and_loses_none(tmp_path: Path) -> None:
    path = holder(tmp_path / "holder")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = os.listdir("/proc/self/fd")
    resource.setrlimit(resource.RLIMIT_NOFILE, (FEW, hard))
    try:
        with pytest.raises(UnavailableError, match=f"no more than {FEW} may be open; the holder keeps them all"):
            take_back(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert os.listdir("/proc/self/fd") == before
    end(path)
