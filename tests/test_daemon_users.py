"""Users of one host: whose VMM may receive what, and what each may see and do of the others' migrations."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.daemon import DaemonProcess
from support.polling import eventually
from support.users import ALICE, BOB, as_user, connect_as, needs_root, open_folder
from support.vmm import PAGE, Vmm

from gmemd import status
from gmemd.errors import PermissionRefusedError, UnavailableError

pytestmark = needs_root
SIZE = 16 * PAGE
SETTINGS = f"""
[limits]
migrations = 4
migrations_of_user = 2
[vmms]
"a-*" = ["{ALICE}"]
"b-*" = ["{BOB}"]
"both" = ["{ALICE}", "{BOB}"]
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    with open_folder() as folder:
        yield folder


@pytest.fixture
def daemon(folder: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(folder, SETTINGS) as daemon:
        for path in (daemon.socket, daemon.status_socket):
            path.chmod(0o666)
        yield daemon
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log.read_text()


class UsersVmm(Vmm):
    """A VMM whose connection is a certain user's."""

    def __init__(self, uid: int) -> None:
        super().__init__(SIZE)
        self._uid = uid

    def connect(self, daemon: Path) -> None:
        connect_as(self._uid, self.socket, daemon)


def names(daemon: DaemonProcess, uid: int, which: str = "migrations") -> set[str]:
    told = as_user(uid, daemon.status)
    return {migration["migration"] for migration in told[which]}


def arrived(daemon: DaemonProcess, *wanted: str) -> None:
    eventually(lambda: names(daemon, 0) == set(wanted))


def test_a_rule_says_which_users_vmm_may_receive_what(daemon: DaemonProcess) -> None:
    with UsersVmm(ALICE) as alices, UsersVmm(BOB) as bobs, UsersVmm(0) as roots:
        alices.hand_off(daemon.socket, "b-1")
        assert alices.receive() == {"error": f"migration b-1: no rule in [vmms] lets user {ALICE} receive it"}
        assert alices.receive() == {}
        assert f"VMM refused: migration b-1: no rule in [vmms] lets user {ALICE}" in daemon.log.read_text()
        bobs.hand_off(daemon.socket, "c")
        assert bobs.receive() == {"error": f"migration c: no rule in [vmms] lets user {BOB} receive it"}
        roots.hand_off(daemon.socket, "c")
        arrived(daemon, "c")
    with UsersVmm(ALICE) as alices, UsersVmm(BOB) as bobs:
        alices.hand_off(daemon.socket, "a-1")
        bobs.hand_off(daemon.socket, "both")
        arrived(daemon, "c", "a-1", "both")
    for name in ("c", "a-1", "both"):
        daemon.abandon(name)


def test_a_user_sees_and_gives_up_only_its_own(daemon: DaemonProcess) -> None:
    with UsersVmm(ALICE) as alices, UsersVmm(BOB) as bobs:
        alices.hand_off(daemon.socket, "a-1")
        bobs.hand_off(daemon.socket, "b-1")
        arrived(daemon, "a-1", "b-1")
        assert names(daemon, ALICE) == {"a-1"}
        assert names(daemon, BOB) == {"b-1"}
        assert not names(daemon, 65534)
        with pytest.raises(UnavailableError, match=r"^no migration 'a-1' here$"):
            as_user(BOB, lambda: daemon.abandon("a-1"))
        assert names(daemon, ALICE) == {"a-1"}
        as_user(BOB, lambda: daemon.abandon("b-1"))
        assert bobs.expect("abandoned")
        eventually(lambda: names(daemon, BOB, "finished") == {"b-1"})
        assert names(daemon, ALICE, "finished") == set()
        as_user(ALICE, lambda: daemon.abandon("a-1"))
        assert alices.expect("abandoned")
        eventually(lambda: names(daemon, 0, "finished") == {"a-1", "b-1"})


def test_a_user_whom_the_socket_keeps_out(daemon: DaemonProcess) -> None:
    daemon.status_socket.chmod(0o600)
    with pytest.raises(PermissionRefusedError, match=f"user {ALICE} may not ask: Permission denied$"):
        as_user(ALICE, daemon.status)


def test_a_name_is_the_first_users(daemon: DaemonProcess) -> None:
    with UsersVmm(ALICE) as alices, UsersVmm(BOB) as bobs:
        alices.hand_off(daemon.socket, "both")
        arrived(daemon, "both")
        bobs.hand_off(daemon.socket, "both")
        assert bobs.receive() == {"error": "migration both: another VMM receives it already: sent by the VMM"}
        assert names(daemon, ALICE) == {"both"}
        daemon.abandon("both")
        assert alices.expect("abandoned")


def test_a_user_leaves_places_to_the_others(daemon: DaemonProcess) -> None:
    vmms = [UsersVmm(ALICE) for _ in range(3)]
    for vmm, name in zip(vmms[:2], ("a-1", "a-2"), strict=True):
        vmm.hand_off(daemon.socket, name)
    arrived(daemon, "a-1", "a-2")
    vmms[2].hand_off(daemon.socket, "a-3")
    assert vmms[2].receive() == {"error": f"migration a-3: user {ALICE} has 2 migrations already, its limit"}
    with UsersVmm(BOB) as bobs:
        bobs.hand_off(daemon.socket, "b-1")
        arrived(daemon, "a-1", "a-2", "b-1")
    for name in ("a-1", "a-2", "b-1"):
        daemon.abandon(name)
        daemon.ended(name)
    for vmm in vmms:
        vmm.close()


def silent(uid: int, path: Path, kind: socket.SocketKind, count: int) -> list[socket.socket]:
    """Connections of a user who says nothing."""
    made = [socket.socket(socket.AF_UNIX, kind) for _ in range(count)]
    for sock in made:
        connect_as(uid, sock, path)
    return made


def test_silent_vmms_hold_only_a_users_places(daemon: DaemonProcess) -> None:
    hold = silent(ALICE, daemon.socket, socket.SOCK_SEQPACKET, 49)
    assert b"too many VMMs in the middle of a hand-off" in hold[-1].recv(1000)
    with UsersVmm(BOB) as bobs:
        bobs.hand_off(daemon.socket, "b-1")
        arrived(daemon, "b-1")
        daemon.abandon("b-1")
        assert bobs.expect("abandoned")
    for sock in hold:
        sock.close()


def test_silent_callers_hold_only_a_users_places(daemon: DaemonProcess) -> None:
    hold = silent(ALICE, daemon.status_socket, socket.SOCK_STREAM, 17)
    assert hold[-1].recv(1000) == b""
    assert names(daemon, BOB) == set()
    for sock in hold:
        sock.close()


def test_the_sockets_mode_keeps_others_out(folder: Path) -> None:
    with DaemonProcess(folder) as daemon:
        for path, kind in ((daemon.socket, socket.SOCK_SEQPACKET), (daemon.status_socket, socket.SOCK_STREAM)):
            assert path.stat().st_mode & 0o777 == 0o660
            with socket.socket(socket.AF_UNIX, kind) as sock, pytest.raises(PermissionError):
                connect_as(ALICE, sock, path)


@pytest.mark.parametrize("user", ["nobody-of-that-name"])
def test_a_rule_for_nobody(folder: Path, user: str) -> None:
    with pytest.raises(AssertionError, match=rf"gmemd\.toml: \[vmms\] \* = .*: no user {user} on this host"):
        DaemonProcess(folder, f'[vmms]\n"*" = ["{user}"]\n')


def test_status_of_a_stranger_is_no_error(daemon: DaemonProcess) -> None:
    told = as_user(BOB, lambda: status.ask(daemon.status_socket, {"command": "status"}))
    assert told["migrations"] == told["finished"] == []
