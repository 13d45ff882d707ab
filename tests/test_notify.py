"""What we tell the service manager, and what it hands over when it starts us."""

import fcntl
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gmemd.errors import ConfigError
from gmemd.keeping import Keeper
from gmemd.listen import take_descriptors
from gmemd.notify import MAX_NAME, Notifier, from_environment, watchdog_interval

STORE_AND_WAIT = """
import os, sys
from gmemd.notify import from_environment
notifier = from_environment()
assert "NOTIFY_SOCKET" not in os.environ
for name in "one", "two":
    fds = [os.memfd_create(name) for _ in range(2)]
    for number, fd in enumerate(fds):
        os.write(fd, f"{name} {number}".encode())
    assert notifier.store(name, fds)
sys.stdin.read()
"""

TAKE_AND_TELL = """
import json, os
os.environ["LISTEN_PID"] = str(os.getpid())
from gmemd.listen import VARIABLES, take_descriptors
taken = take_descriptors()
assert not any(os.get_inheritable(fd) for fds in taken.values() for fd in fds)
assert not any(variable in os.environ for variable in VARIABLES)
print(json.dumps({name: [os.pread(fd, 99, 0).decode() for fd in fds] for name, fds in taken.items()}))
"""


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The service manager's end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        channel.settimeout(10)
        yield channel


@pytest.fixture
def notifier(manager: socket.socket) -> Notifier:
    return Notifier(manager.getsockname())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (Notifier.ready, b"READY=1"),
        (Notifier.stopping, b"STOPPING=1"),
        (Notifier.alive, b"WATCHDOG=1"),
        (lambda notifier: notifier.remove("m-1"), b"FDSTOREREMOVE=1\nFDNAME=m-1"),
        (lambda notifier: notifier.status("half\nFDSTOREREMOVE=1"), b"STATUS=half FDSTOREREMOVE=1"),
    ],
)
def test_messages(manager: socket.socket, notifier: Notifier, call: Callable[[Notifier], None], message: bytes) -> None:
    call(notifier)
    assert manager.recv(4096) == message


def test_abstract_socket() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(b"\0gmemd-test-%d" % os.getpid())
        Notifier(f"@gmemd-test-{os.getpid()}").ready()
        assert channel.recv(4096) == b"READY=1"


def test_nobody_listens() -> None:
    notifier = from_environment({})
    notifier.ready()
    with open(os.devnull) as file:
        assert not notifier.store("name", [file.fileno()])


def test_failure_is_logged(tmp_path: Path, expect_log: Callable[[str], None]) -> None:
    expect_log("WARNING gmemd.notify: .* is not told READY: No such file")
    Notifier(str(tmp_path / "nowhere")).ready()


def test_a_guest_that_is_not_kept_is_told(tmp_path: Path, expect_log: Callable[[str], None]) -> None:
    expect_log("WARNING gmemd.notify: .*/nowhere is not told FDSTORE: No such file")
    expect_log("ERROR gmemd.keeping: vmm is not kept: the guest will not outlive a restart of the daemon")
    with open(os.devnull) as file:
        Keeper(Notifier(str(tmp_path / "nowhere")), "m").keep("vmm", file.fileno())
        Keeper(Notifier(""), "m").keep("vmm", file.fileno())  # nobody was asked to keep anything


def test_what_is_removed_late_is_not_what_came_since(tmp_path: Path, expect_log: Callable[[str], None]) -> None:
    expect_log("WARNING gmemd.notify: .*/notify is not told FDSTOREREMOVE: No such file")
    notifier = Notifier(str(tmp_path / "notify"))
    notifier.remove("state.m")
    notifier.remove("fd0.m")
    assert not notifier.store("fd0.m", [0])
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        assert notifier.store("fd0.m", [0])
        sock.setblocking(False)
        told = [sock.recv(4096).splitlines()[:2] for _ in range(3)]
    assert told == [
        [b"FDSTOREREMOVE=1", b"FDNAME=state.m"],
        [b"FDSTOREREMOVE=1", b"FDNAME=fd0.m"],
        [b"FDSTORE=1", b"FDNAME=fd0.m"],
    ]


@pytest.mark.parametrize("name", ["", "a:b", "é", "a\nb", "n" * (MAX_NAME + 1)])
def test_name_that_systemd_would_drop(notifier: Notifier, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a descriptor"):
        notifier.store(name, [0])


def test_watchdog_interval() -> None:
    assert watchdog_interval({}) is None
    assert watchdog_interval({"WATCHDOG_USEC": "3000000"}) == 3.0
    assert watchdog_interval({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}) == 3.0
    assert watchdog_interval({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}) is None
    assert watchdog_interval({"WATCHDOG_USEC": "0"}) is None


def test_descriptors_outlive_a_killed_process(manager: socket.socket, tmp_path: Path) -> None:
    environ = os.environ | {"NOTIFY_SOCKET": manager.getsockname()}
    command = [sys.executable, "-c", STORE_AND_WAIT]
    with subprocess.Popen(command, env=environ, stdin=subprocess.PIPE) as first:
        messages = [socket.recv_fds(manager, 4096, 8) for _ in range(2)]
        first.kill()
    kept = [fd for _, fds, _, _ in messages for fd in fds]
    assert [message for message, _, _, _ in messages] == [
        b"FDSTORE=1\nFDNAME=one\nFDPOLL=0",
        b"FDSTORE=1\nFDNAME=two\nFDPOLL=0",
    ]
    told = start_with(kept, {"LISTEN_FDS": "4", "LISTEN_FDNAMES": "one:one:two:two"}, tmp_path / "told")
    assert json.loads(told) == {"one": ["one 0", "one 1"], "two": ["two 0", "two 1"]}


def start_with(kept: list[int], variables: dict[str, str], output: Path) -> str:
    """Runs TAKE_AND_TELL as the service manager would: with `kept`, now closed here, from descriptor 3 on."""
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in kept]
    actions = [(os.POSIX_SPAWN_DUP2, fd, place) for place, fd in enumerate(high, 3)]
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", TAKE_AND_TELL],
        os.environ | variables,
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, str(output), os.O_WRONLY | os.O_CREAT, 0o600), *actions],
    )
    for fd in kept + high:
        os.close(fd)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return output.read_text()


@pytest.mark.parametrize("pid", ["", "1", "-1", f"{os.getpid()} "])
def test_meant_for_another_process(pid: str) -> None:
    variables = {"LISTEN_FDS": "1", "LISTEN_PID": pid, "LISTEN_FDNAMES": "a"}
    assert take_descriptors(variables) == {}
    assert variables == {}


@pytest.mark.parametrize(
    ("number", "names", "message"),
    [
        ("", "", "LISTEN_FDS=: not a number of descriptors"),
        ("-1", "", "LISTEN_FDS=-1: not a number of descriptors"),
        ("1000000", "", "LISTEN_FDS=1000000: not a number of descriptors"),
        ("2", "a:b:c", "LISTEN_FDS=2 with 3 names"),
        ("99999", "", r"LISTEN_FDS=99999, but \d+ \(unknown\): Bad file descriptor"),
    ],
)
def test_contradiction(number: str, names: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        take_descriptors({"LISTEN_FDS": number, "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": names})


def test_no_descriptors() -> None:
    assert take_descriptors({"LISTEN_FDS": "0", "LISTEN_PID": str(os.getpid())}) == {}
