"""Wrong hand-offs to a daemon that serves another guest: the VMM is told what is wrong, nothing of it is kept."""

import json
import os
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.daemon import DaemonProcess
from support.neighbour import COUNT, SETTINGS
from support.vmm import PAGE, Vmm

pytest_plugins = ["support.daemon_fixtures", "support.neighbour_fixtures"]
pytestmark = [pytest.mark.daemon(SETTINGS), pytest.mark.usefixtures("nobody_else_notices")]


def changed(vmm: Vmm, **changes: Any) -> dict[str, Any]:
    """A hand-off whose first region is changed."""
    regions = vmm.regions
    regions[0] |= changes
    return {"gmemd": 1, "receive": "bad", "regions": regions}


def overlapping(key: str) -> Callable[[Vmm], dict[str, Any]]:
    """Two halves of the file, but for one key."""

    def change(vmm: Vmm) -> dict[str, Any]:
        half = COUNT // 2 * PAGE
        message = changed(vmm, size=half)
        first = message["regions"][0]
        second = first | {name: first[name] + half for name in ("gpa", "hva", "offset")}
        message["regions"].append(second | {key: first[key] + half - PAGE})
        return message

    return change


FILE, USERFAULTFD, SOCKET, PIPE, EVENTS, FOLDER, NOTHING = (
    "file",
    "userfaultfd",
    "socket",
    "pipe",
    "eventfd",
    "folder",
    "/dev/null",
)

Message = dict[str, Any] | bytes
WRONG_HANDOFFS: dict[str, tuple[Message | Callable[[Vmm], Message], str]] = {
    "no JSON": (b"{", "not JSON: "),
    "no UTF-8": (b"\xff\xfe\xff", "not JSON: "),
    "no object": (b"[1]", "not a JSON object"),
    "nested too deep": (b"[" * 60000, "not JSON: "),
    "values too deep for repr()": (
        b'{"gmemd": 1, "receive": ' + b"[" * 900 + b"]" * 900 + b"}",
        '"receive" names no migration: [[[[',
    ),
    "a number of 5000 digits": (b'{"gmemd": ' + b"9" * 5000 + b"}", "not JSON: "),
    "no version": ({"receive": "bad"}, "version None of the hand-off (this is version 1)"),
    "version 2": (lambda vmm: changed(vmm) | {"gmemd": 2}, "version 2 of the hand-off"),
    "version true": (lambda vmm: changed(vmm) | {"gmemd": True}, "version True of the hand-off"),
    "no name": (lambda vmm: {"gmemd": 1, "regions": vmm.regions}, '"receive" names no migration: None'),
    "a name with a path": (lambda vmm: changed(vmm) | {"receive": "a/b"}, "\"receive\" names no migration: 'a/b'"),
    "a name of a surrogate": (
        b'{"gmemd": 1, "receive": "\\ud800"}',
        "\"receive\" names no migration: '\\ud800'",
    ),
    "the neighbour's name": (
        lambda vmm: changed(vmm) | {"receive": "neighbour"},
        "migration neighbour: another VMM receives it already",
    ),
    "no regions": (lambda vmm: changed(vmm) | {"regions": []}, '"regions" is not a list of 1 to 1024'),
    "a region that is none": (lambda vmm: changed(vmm) | {"regions": [0]}, "region 0: not a JSON object"),
    "too many regions": (lambda vmm: changed(vmm) | {"regions": vmm.regions * 5}, "5 regions (this daemon takes 4)"),
    "too much memory": (lambda vmm: changed(vmm, size=2 << 30), "2147483648 bytes of guest memory (this daemon takes"),
    "a file that did not come": (lambda vmm: changed(vmm, file=2), "region 0: file = 2 (a whole number from 0 to 1)"),
    "a file before the first": (lambda vmm: changed(vmm, file=-1), "region 0: file = -1 "),
    "true for a number": (lambda vmm: changed(vmm, uffd=True), "region 0: uffd = True "),
    "half a byte": (lambda vmm: changed(vmm, size=4096.5), "region 0: size = 4096.5 "),
    "nothing": (lambda vmm: changed(vmm, size=0), "region 0: size = 0"),
    "half a page": (lambda vmm: changed(vmm, size=6000), "region 0: size = 6000 (a multiple of 4096)"),
    "beside a page": (lambda vmm: changed(vmm, gpa=1), "region 0: gpa = 1 (a multiple of 4096)"),
    "2^63": (lambda vmm: changed(vmm, gpa=2**63), "region 0: gpa = 9223372036854775808 "),
    "pages of 3 KiB": (lambda vmm: changed(vmm, page_size=3072), "region 0: page_size = 3072 (a power of two"),
    "pages of other size": (
        lambda vmm: changed(vmm, page_size=8192, hva=vmm.addresses[0] & ~8191),
        "region 0: page_size = 8192, its memory file has pages of 4096",
    ),
    "a file too short": (
        lambda vmm: changed(vmm, size=(COUNT + 1) * PAGE),
        f"region 0: the file has {COUNT * PAGE} bytes, the region needs {(COUNT + 1) * PAGE}",
    ),
    "an offset beyond the end": (
        lambda vmm: changed(vmm, offset=2**62),
        f"region 0: the file has {COUNT * PAGE} bytes, the region needs {2**62 + COUNT * PAGE}",
    ),
    "guest addresses twice": (overlapping("gpa"), "regions 0 and 1: their guest physical addresses overlap"),
    "host addresses twice": (overlapping("hva"), "regions 0 and 1: their host addresses overlap"),
    "one file twice": (overlapping("offset"), "regions 0 and 1: their parts of one memory file overlap"),
}


def told_error(vmm: Vmm) -> str:
    """What is wrong; the daemon must hang up behind that."""
    error = str(vmm.expect("error")["error"])
    assert vmm.receive() == {}
    return error


@pytest.mark.parametrize(("message", "error"), WRONG_HANDOFFS.values(), ids=WRONG_HANDOFFS.keys())
def test_wrong_hand_offs(daemon: DaemonProcess, message: Message | Callable[[Vmm], Message], error: str) -> None:
    with Vmm(COUNT * PAGE) as vmm:
        vmm.connect(daemon.socket)
        vmm.send(message(vmm) if callable(message) else message, [*vmm.files, vmm.uffd])
        told = told_error(vmm)
    assert told.startswith(error)
    assert told.endswith(": sent by the VMM")


def test_addresses_where_nothing_is_mapped(daemon: DaemonProcess) -> None:
    with Vmm(COUNT * PAGE) as vmm:
        vmm.connect(daemon.socket)
        vmm.send(changed(vmm, hva=1 << 40), [*vmm.files, vmm.uffd])
        assert told_error(vmm).startswith("region 0: userfaultfd: cannot register 0x10000 bytes at 0x10000000000")


@pytest.mark.parametrize(
    ("claimed", "error"),
    [
        ((FILE, FILE), "region 0: not a userfaultfd but /memfd:guest (deleted)"),
        ((FILE, PIPE), "region 0: not a userfaultfd but pipe:["),
        ((FILE, EVENTS), "region 0: not a userfaultfd but anon_inode:[eventfd]"),
        ((USERFAULTFD, USERFAULTFD), "region 0: not a memory file (mode 600)"),
        ((PIPE, USERFAULTFD), "region 0: not a memory file (mode 10600)"),
        ((SOCKET, USERFAULTFD), "region 0: not a memory file (mode 140777)"),
        ((FOLDER, USERFAULTFD), "region 0: not a memory file (mode 40755)"),
        ((NOTHING, USERFAULTFD), "region 0: not a memory file (mode 20666)"),
    ],
)
def test_descriptors_that_are_not_what_they_claim(daemon: DaemonProcess, claimed: tuple[str, str], error: str) -> None:
    with Vmm(COUNT * PAGE) as vmm, ExitStack() as stack:
        end, other_end = os.pipe()
        fds = {
            FILE: vmm.files[0],
            USERFAULTFD: vmm.uffd,
            SOCKET: vmm.socket.fileno(),
            PIPE: end,
            EVENTS: os.eventfd(0),
            FOLDER: os.open("/", os.O_RDONLY),
            NOTHING: os.open("/dev/null", os.O_RDWR),
        }
        for fd in (end, other_end, *(fds[kind] for kind in (EVENTS, FOLDER, NOTHING))):
            stack.callback(os.close, fd)
        vmm.connect(daemon.socket)
        vmm.send(changed(vmm), [fds[kind] for kind in claimed])
        told = told_error(vmm)
    assert told.startswith(error)
    assert told.endswith(": sent by the VMM")


def test_a_file_on_a_disk(daemon: DaemonProcess, tmp_path: Path) -> None:
    if subprocess.check_output(["stat", "--file-system", "--format=%T", tmp_path], text=True).strip() == "tmpfs":
        pytest.skip(f"{tmp_path} is in memory")
    with Vmm(COUNT * PAGE) as vmm, (tmp_path / "file").open("w+b") as file:
        file.truncate(COUNT * PAGE)
        vmm.connect(daemon.socket)
        vmm.send(changed(vmm), [file.fileno(), vmm.uffd])
        assert told_error(vmm) == "region 0: not a memory file but one on a disk: sent by the VMM"


def test_a_file_that_holds_data(daemon: DaemonProcess) -> None:
    with Vmm(COUNT * PAGE) as vmm:
        os.pwrite(vmm.files[0], b"x", 5 * PAGE)
        vmm.hand_off(daemon.socket, "bad")
        assert "its memory file holds data already" in told_error(vmm)


def test_a_descriptor_that_nothing_names(daemon: DaemonProcess) -> None:
    with Vmm(COUNT * PAGE) as vmm:
        vmm.connect(daemon.socket)
        vmm.send(changed(vmm), [*vmm.files, vmm.uffd, vmm.socket.fileno()])
        assert told_error(vmm) == "3 descriptors, 2 of them named: sent by the VMM"


@pytest.mark.parametrize("count", [65, 66, 200])
def test_too_many_descriptors(daemon: DaemonProcess, count: int) -> None:
    with Vmm(COUNT * PAGE) as vmm:
        vmm.connect(daemon.socket)
        vmm.send(changed(vmm), vmm.files * count)
        assert told_error(vmm) == "a message of more than 131072 bytes or 64 descriptors: sent by the VMM"


def test_one_userfaultfd_under_two_numbers(daemon: DaemonProcess) -> None:
    """The same addresses of the same VMM may not be two regions, even of two files."""
    with Vmm(COUNT * PAGE, COUNT * PAGE) as vmm:
        regions = vmm.regions
        regions[1] |= {"hva": regions[0]["hva"], "uffd": 3}
        again = os.dup(vmm.uffd)
        vmm.connect(daemon.socket)
        vmm.send({"gmemd": 1, "receive": "bad", "regions": regions}, [*vmm.files, vmm.uffd, again])
        os.close(again)
        assert told_error(vmm) == "regions 0 and 1: their host addresses overlap: sent by the VMM"


def test_one_file_under_two_numbers(daemon: DaemonProcess) -> None:
    with Vmm(COUNT * PAGE, COUNT * PAGE) as vmm:
        vmm.connect(daemon.socket)
        vmm.send({"gmemd": 1, "receive": "bad", "regions": vmm.regions}, [vmm.files[0], vmm.files[0], vmm.uffd])
        assert told_error(vmm) == "regions 0 and 1: their parts of one memory file overlap: sent by the VMM"


def test_too_many_bytes(daemon: DaemonProcess) -> None:
    with Vmm(COUNT * PAGE) as vmm:
        vmm.connect(daemon.socket)
        vmm.send(json.dumps(changed(vmm)).encode().ljust(131073), [*vmm.files, vmm.uffd])
        assert told_error(vmm) == "a message of more than 131072 bytes or 64 descriptors: sent by the VMM"


def test_nothing_at_all(daemon: DaemonProcess) -> None:
    with Vmm(COUNT * PAGE) as vmm:
        vmm.connect(daemon.socket)
        vmm.send(b"", [*vmm.files, vmm.uffd])
        assert vmm.receive() == {}


def test_later_words_of_a_vmm(daemon: DaemonProcess, vmm: Vmm, name: str) -> None:
    wrong = {
        b"{": "not JSON: ",
        b"{}": "not a list of [region, first page, pages]",
        b'{"discard": [[1, 0, 1]]}': "range 0: [1, 0, 1] lies in no region",
        b'{"discard": [[0, 0, 1], [0, 15, 2]]}': "range 1: [0, 15, 2] lies in no region",
        b'{"discard": [[0, 0, 0]]}': "range 0: [0, 0, 0] lies in no region",
        b'{"discard": [[0, 0]]}': "range 0: [0, 0] lies in no region",
        b'{"discard": [[0, 0, ' + b"[" * 900 + b"]" * 900 + b"]]}": "range 0: [0, 0, [[[",
        b" " * 131073: "a message of more than 131072 bytes or 64 descriptors",
    }
    for message, error in wrong.items():
        vmm.send(message, [vmm.uffd])
        assert vmm.expect("error")["error"].startswith(error)
    vmm.send({"discard": [[0, 2, 1], [0, 5, 3]]})
    assert vmm.receive() == {"discarded": True}
    vmm.send({"discard": [[0, 2, 1]], "id": 7})
    assert vmm.receive() == {"discarded": True, "id": 7}
    assert daemon.migration(name)["pages_received"] == 4
