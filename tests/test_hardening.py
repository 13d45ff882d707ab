"""The daemon as its unit runs it: its own user, no capability, few system calls; and what it never tells."""

import errno
import os
import random
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
from support import seccomp
from support.daemon import DaemonProcess
from support.polling import eventually
from support.rawsource import RawSource
from support.source import SourceProcess, guest_content
from support.users import ALICE, BOB, as_user, needs_root, open_folder, runs_for_anybody
from support.vmm import PAGE, Vmm

from gmemd.daemon import PAGER_THREAD
from gmemd.migrate import wire
from gmemd.native import crc32c

pytestmark = needs_root
UNIT = Path(__file__).parents[1] / "systemd/gmemd.service"
PAGES = 64
WITHOUT = ("--clear-groups", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")
AS_ALICE = (*runs_for_anybody(), "setpriv", f"--reuid={ALICE}", f"--regid={ALICE}", *WITHOUT)
FILTERED = (sys.executable, seccomp.__file__, str(UNIT))


@pytest.fixture
def folder() -> Iterator[Path]:
    with open_folder() as folder:
        os.chown(folder, ALICE, ALICE)
        yield folder


def good_migration(daemon: DaemonProcess, content: bytes, folder: Path) -> None:
    (folder / "memory").write_bytes(content)
    with Vmm(len(content)) as vmm, SourceProcess(daemon.port, "good", "--file", folder / "memory") as source:
        vmm.hand_off(daemon.socket, "good").expect("ready")
        assert vmm.read(0, pages=PAGES) == content
        vmm.expect("done")
        assert source.result().code == 0


def facts(daemon: DaemonProcess) -> dict[str, str]:
    """Of /proc/PID/status."""
    lines = Path(f"/proc/{daemon.process.pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_it_serves_a_guest_with_no_privilege(folder: Path, rng: random.Random) -> None:
    with DaemonProcess(folder, prefix=(*AS_ALICE, *FILTERED)) as daemon:
        good_migration(daemon, guest_content(rng, PAGES), folder)
        told = facts(daemon)
        assert told["Uid"].split() == [str(ALICE)] * 4
        assert told["Groups"] == ""
        capabilities = {told[kind] for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
        assert capabilities == {"0000000000000000"}
        assert told["NoNewPrivs"] == "1"
        assert told["Seccomp"] == "2"
        assert daemon.stop() == 0
        assert "warning" not in daemon.log.read_text()


def priorities(daemon: DaemonProcess) -> dict[str, int]:
    """Nice value by name of thread."""
    threads = Path(f"/proc/{daemon.process.pid}/task").iterdir()
    return {(path / "comm").read_text().strip(): os.getpriority(os.PRIO_PROCESS, int(path.name)) for path in threads}


@pytest.mark.parametrize("allowed", [False, True])
def test_the_pager_goes_first_where_it_may(folder: Path, allowed: bool) -> None:
    """Without a capability; and nothing is said where it may not."""
    first = int(re.findall(r"^LimitNICE=(-\d+)$", UNIT.read_text(), re.MULTILINE)[0]) if allowed else 0
    raised = ("prlimit", f"--nice={20 - first}") if allowed else ()
    if subprocess.run([*raised, "true"], capture_output=True).returncode:
        pytest.skip("this root may not raise RLIMIT_NICE: no CAP_SYS_RESOURCE")
    with DaemonProcess(folder, prefix=(*raised, *AS_ALICE, *FILTERED)) as daemon:
        eventually(lambda: priorities(daemon).get(PAGER_THREAD) == first)  # it is ready before its threads are named
        found = priorities(daemon)
        del found[PAGER_THREAD]
        assert set(found.values()) == {0}
        assert daemon.stop() == 0
        assert "warning" not in daemon.log.read_text()


def test_the_units_calls_are_few() -> None:
    """None that loads code into the kernel, looks into processes, mounts, or changes who one is."""
    names = seccomp.allowed(UNIT)
    assert not names & {"ptrace", "bpf", "mount", "init_module", "setuid", "unshare", "pidfd_getfd", "reboot"}
    assert len(names) < 130


def test_the_filter_bites() -> None:
    code = "import ctypes; libc = ctypes.CDLL(None, use_errno=True); libc.setns(-1, 0); print(ctypes.get_errno())"
    run = subprocess.run([*FILTERED, sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) == errno.EPERM


def test_nobody_looks_into_its_memory(folder: Path) -> None:
    """Not even its own user."""
    with DaemonProcess(folder, prefix=AS_ALICE) as daemon:
        process = Path(f"/proc/{daemon.process.pid}")
        for uid in (ALICE, BOB):
            with pytest.raises(PermissionError):
                as_user(uid, (process / "mem").open)
            with pytest.raises(PermissionError):
                as_user(uid, lambda: list((process / "fd").iterdir()))
        assert daemon.stop() == 0


def test_it_leaves_no_core_dump(folder: Path) -> None:
    try:
        pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    except FileNotFoundError:
        pytest.skip("this kernel leaves no core dumps at all")
    limit = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (limit[1], limit[1]))
    try:
        with DaemonProcess(folder) as daemon:
            pid = daemon.process.pid
            daemon.process.send_signal(signal.SIGXCPU)  # dumps core, and is not ignored by a shell's background jobs
            _, how = os.waitpid(pid, 0)
            daemon.process.returncode = -os.WTERMSIG(how)
            assert os.WTERMSIG(how) == signal.SIGXCPU
            assert not os.WCOREDUMP(how), pattern
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, limit)


def state_message(piece: bytes) -> bytes:
    """One that is longer than it may be."""
    body: bytes = msgpack.packb({"type": "state", "piece": piece})
    return wire.HEAD.pack(len(body), crc32c(body)) + body


def test_what_a_guest_knows_is_told_to_nobody(folder: Path, rng: random.Random) -> None:
    """Nothing of its memory, nor of the VMM's state, is in a log, in a status, in a trace or in an error message."""
    secret = b"a secret " + rng.randbytes(8).hex().encode()
    content = (secret * PAGES * PAGE)[: PAGES * PAGE]
    traces = folder / "traces"
    with DaemonProcess(folder, f'[trace]\ndirectory = "{traces}"\nstages = true\n[limits]\nstate = "4K"\n') as daemon:
        good_migration(daemon, content, folder)
        answers = [str(daemon.ended("good"))]
        with Vmm(PAGES * PAGE) as vmm:
            vmm.hand_off(daemon.socket, "too-much")
            for wrong in (wire.encode(wire.State(secret * 400)), state_message(secret * 4000)):
                with RawSource(daemon.port, "too-much", [[0, PAGES, 12]]) as source:
                    source.join().control.socket.sendall(wrong)
                    answers.append(str(source.control.receive()))
            daemon.abandon("too-much")
            answers.append(str(vmm.receive()))
            answers.append(str(daemon.ended("too-much")))
        assert daemon.stop() == 0
        told = daemon.log.read_text().join(answers).encode()
        assert b"state of more than 4096 bytes" in told
        assert b"state: bad piece: 100000 bytes" in told
        written = [path for path in traces.iterdir() if path.is_file()]
        assert written
        for piece in (secret, secret[:9]):
            assert piece not in told
            assert all(piece not in path.read_bytes() for path in written)
