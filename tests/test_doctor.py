"""`gmemd doctor`: kernels differ, so that what it says is compared with what is found out by other means."""

import errno
import fcntl
import json
import mmap
import os
import pty
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gmemd import doctor, probe, probe_apart, probe_host
from gmemd.probe import CHECKS, Check, Finding, Memory, ability

SOURCES = Path(__file__).parent / "doctor"
COMPILE = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread")
NOBODY = 65534
HUGE_PAGE = 2 << 20
TIMEOUT = 120  # seconds; an emulated machine takes ten, any other less than one

DOCTOR = "import sys; from gmemd import doctor; sys.exit(doctor.main({json}))"
# The modules are loaded by root, as nobody may not be able to read where they lie.
AS_NOBODY = f"""
import encodings.idna, os, sys
from gmemd import doctor
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
sys.exit(doctor.main(True))
"""

# From linux/kvm.h, for a second opinion without our C
KVM_CREATE_VM = 0xAE01
KVM_CREATE_GUEST_MEMFD = 0xC040AED4
FLAGS = {"mmap": 1, "init_shared": 2, "no_direct_map": 4, "write": 8}


def run(code: str, *before: str) -> subprocess.CompletedProcess[str]:
    """The doctor in a process of its own, which never writes on stderr, whatever befalls it."""
    command = [*before, sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.stderr == ""
    assert done.returncode in (os.EX_OK, os.EX_UNAVAILABLE)
    return done


def ask(code: str = DOCTOR.format(json=True), *before: str) -> dict[str, Any]:
    done = run(code, *before)
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["ok"] == (done.returncode == os.EX_OK)
    assert "a bug in gmemd" not in done.stdout
    return report


def check_of(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(check for check in report["checks"] if check["name"] == name)


def verdicts(report: dict[str, Any]) -> dict[str, bool | None]:
    return {check["name"]: check["ok"] for check in report["checks"]}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return ask()


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """`tool(name)`: the path of tests/doctor/NAME.c, compiled."""
    folder = tmp_path_factory.mktemp("doctor")

    def build(name: str) -> str:
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("there is no C compiler")
        path = folder / name
        subprocess.run([compiler, *COMPILE, "-o", path, SOURCES / f"{name}.c"], check=True)
        return str(path)

    return build


# What it says, and how


def test_json_has_every_check_and_backing_and_nothing_else(report: dict[str, Any]) -> None:
    assert set(report) == {"ok", "kernel", "user", "checks", "backings"}
    assert report["kernel"] == {"release": os.uname().release, "machine": os.uname().machine}
    assert [check["name"] for check in report["checks"]] == list(CHECKS)
    for check in report["checks"]:
        assert set(check) == {"name", "topic", "ok", "value", "why", "means", "mend"}
        assert check["name"].startswith(check["topic"] + ".")
        assert check["ok"] in (True, False, None)
        assert check["why"]
        assert check["means"]
    assert set(report["backings"]) == set(probe.BACKINGS)
    for backing in report["backings"].values():
        assert set(backing) == {"ok", "trap", "populate", "why"}
        assert backing["ok"] in (True, False, None)
        assert backing["trap"] in ("minor", "missing+minor", None)
        assert set(backing["populate"]) <= set(probe.POPULATE)
        assert (backing["ok"] is True) == (backing["why"] == "")


def test_exit_code_says_whether_guests_can_be_received(report: dict[str, Any]) -> None:
    works = [report["backings"][name]["ok"] for name in doctor.ENOUGH]
    assert report["ok"] == any(works)


def test_what_is_not_read_on_a_terminal_is_plain_and_complete() -> None:
    text = run(DOCTOR.format(json=False)).stdout
    assert "\x1b" not in text
    lines = text.splitlines()
    assert all(line == line.rstrip() for line in lines)
    of_memory = {name.split(".")[1] for name in CHECKS if name.split(".")[0] in set(Memory)}
    others = {name for name in CHECKS if name.split(".")[0] not in set(Memory)}
    assert of_memory | others | set(probe.BACKINGS) <= {line.split()[0] for line in lines if line}


@pytest.mark.parametrize(("terminal", "coloured"), [("xterm-256color", True), ("dumb", False)])
def test_a_terminal_gets_colours_if_it_has_any_and_whole_names(terminal: str, coloured: bool) -> None:
    near, far = pty.openpty()
    environment = {**os.environ, "TERM": terminal, "COLUMNS": "80"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(
        [sys.executable, "-c", DOCTOR.format(json=False)], stdout=far, stderr=far, env=environment
    ) as child:
        os.close(far)
        text = b""
        while select.select([near], [], [], TIMEOUT)[0]:
            try:
                text += os.read(near, 65536)
            except OSError:  # EIO is how a terminal says that the other end is closed
                break
    os.close(near)
    assert child.returncode in (os.EX_OK, os.EX_UNAVAILABLE)
    assert (b"\x1b[" in text) == coloured
    assert all(name.encode() in text for name in (*probe.BACKINGS, "populate_write", "userfaultfd.access"))


# Whether it is true


def guest_memfd(names: list[str]) -> int:
    """A guest_memfd of one page with these flags. Raises OSError."""
    request = bytearray(struct.pack("=2Q48x", mmap.PAGESIZE, sum(FLAGS[name] for name in names)))
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    try:
        vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
        try:
            return int(fcntl.ioctl(vm, KVM_CREATE_GUEST_MEMFD, request, True))
        finally:
            os.close(vm)
    finally:
        os.close(kvm)


def memfd() -> int:
    fd = os.memfd_create("test-doctor", os.MFD_CLOEXEC)
    os.ftruncate(fd, mmap.PAGESIZE)
    return fd


def hugetlb() -> int:
    fd = os.memfd_create("test-doctor", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    os.ftruncate(fd, HUGE_PAGE)
    return fd


MAKE: dict[Memory, tuple[Callable[[], int], int]] = {
    Memory.MEMFD: (memfd, mmap.PAGESIZE),
    Memory.HUGETLB: (hugetlb, HUGE_PAGE),
    Memory.GUEST_MEMFD: (partial(guest_memfd, ["mmap", "init_shared"]), mmap.PAGESIZE),
    Memory.NO_DIRECT_MAP: (partial(guest_memfd, ["mmap", "init_shared", "no_direct_map"]), mmap.PAGESIZE),
}


@pytest.mark.parametrize("memory", Memory)
def test_traps_are_those_that_a_loading_thread_runs_into(
    memory: Memory, report: dict[str, Any], tool: Callable[[str], str]
) -> None:
    if not check_of(report, "userfaultfd.access")["ok"]:
        pytest.skip(check_of(report, "userfaultfd.access")["why"])
    if check_of(report, f"{memory}.minor")["ok"] is None:
        pytest.skip(check_of(report, f"{memory}.minor")["why"])
    make, page_size = MAKE[memory]
    fd = make()
    try:
        command = [tool("witness"), str(fd), str(page_size)]
        seen = subprocess.run(
            command, pass_fds=[fd], capture_output=True, text=True, timeout=TIMEOUT, check=True
        ).stdout
    finally:
        os.close(fd)
    witnessed = dict(line.split() for line in seen.splitlines())
    assert set(witnessed) == {"minor", "absent_in_minor", "missing"}
    for what, came in witnessed.items():
        check = check_of(report, f"{memory}.{what}")
        assert (check["value"] or "refused") == came
        assert check["ok"] == (came in ("minor", "missing"))


@pytest.mark.parametrize("flag", FLAGS)
def test_guest_memfd_flags_are_those_that_the_kernel_takes(flag: str, report: dict[str, Any]) -> None:
    told = check_of(report, "kvm.guest_memfd_flags")
    if told["ok"] is None:
        pytest.skip(told["why"])
    try:
        os.close(guest_memfd([flag]))
        taken = True
    except OSError:
        taken = False
    assert (flag in told["value"]) == taken


def test_guest_memfd_write_is_told_as_the_kernel_does_it(report: dict[str, Any]) -> None:
    flags = check_of(report, "kvm.guest_memfd_flags")
    if not flags["ok"]:
        pytest.skip(flags["why"])
    fd = guest_memfd([name for name in flags["value"] if name != "no_direct_map"])
    try:
        with mmap.mmap(fd, mmap.PAGESIZE) as mapping:
            try:
                written = os.pwrite(fd, b"\xa5" * mmap.PAGESIZE, 0) == mmap.PAGESIZE
            except OSError:
                written = False
            assert (mapping[:1] == b"\xa5") == written
            mapping[:2] = b"ab"  # populate_copy, which mapping and touching is
    finally:
        os.close(fd)
    assert check_of(report, "guest_memfd.populate_write")["ok"] == written
    assert check_of(report, "guest_memfd.populate_copy")["ok"] is True


@pytest.mark.lab
def test_what_the_proposed_patches_bring_is_found(report: dict[str, Any]) -> None:
    try:
        os.close(guest_memfd(list(FLAGS)))
    except OSError as error:
        pytest.skip(f"a kernel without them: {error.strerror}")
    for name in ("guest_memfd", "guest_memfd_userfault", "guest_memfd_no_direct_map"):
        backing = report["backings"][name]
        assert (backing["ok"], backing["trap"], backing["populate"][0]) == (True, "missing+minor", "write")
    assert check_of(report, "kvm.userfault")["ok"] is True
    assert check_of(report, "guest_memfd_no_direct_map.populate_write")["value"] == "once"
    assert check_of(report, "guest_memfd_no_direct_map.pin")["ok"] is False


def test_userfaultfd_can_be_opened_where_it_says_so(report: dict[str, Any]) -> None:
    assert bool(check_of(report, "userfaultfd.device")["ok"]) == os.access("/dev/userfaultfd", os.R_OK | os.W_OK)


def test_ktls_is_there_if_the_kernel_lists_it(report: dict[str, Any]) -> None:
    told = check_of(report, "network.ktls")
    if told["ok"] is None:
        pytest.skip(told["why"])
    listed = Path("/proc/sys/net/ipv4/tcp_available_ulp").read_text().split()
    assert told["ok"] == ("tls" in listed)


def test_huge_pages_are_those_of_meminfo(report: dict[str, Any]) -> None:
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    if meminfo.get("Hugepagesize", "").split() != ["2048", "kB"]:
        pytest.skip("meminfo speaks of huge pages of another size")
    free = int(meminfo["HugePages_Free"]) - int(meminfo["HugePages_Rsvd"])
    growth = int(Path("/proc/sys/vm/nr_overcommit_hugepages").read_text()) - int(meminfo["HugePages_Surp"])
    assert check_of(report, "limits.huge_pages_2m")["value"] == free + growth


def test_limits_are_those_of_the_process() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        assert (probe_host.open_files().ok, probe_host.open_files().value) == (False, 200)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_priority_of_a_thread_is_tried_in_one_that_ends(report: dict[str, Any]) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    found = probe_host.priority()
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
    assert found.ok == check_of(report, "limits.priority")["ok"] == (found.value == probe_host.FIRST_NICE)


def test_what_a_write_brings_into_a_memfd_is_told_in_advance(report: dict[str, Any]) -> None:
    with os.fdopen(os.memfd_create("test-doctor"), "r+b") as file:
        file.truncate(2 << 20)
        file.write(b"x")
        file.flush()
        taken = os.fstat(file.fileno()).st_blocks * 512
    found = check_of(report, "limits.large_folios")
    assert (found["ok"], found["value"]) == (taken > mmap.PAGESIZE, taken)


def test_the_limit_of_a_memory_cgroup_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of a made-up process in /a/b: the lowest limit above it counts, not that beyond the mount."""
    (tmp_path / "cgroup").write_text("1:name=systemd:/x\n0::/a/b\n")
    (tmp_path / "mountinfo").write_text(f"30 20 0:26 / {tmp_path}/fs rw - cgroup2 cgroup2 rw\n")
    (tmp_path / "fs/a/b").mkdir(parents=True)
    (tmp_path / "fs/a/b/memory.max").write_text("max\n")
    (tmp_path / "fs/a/memory.max").write_text("4096\n")
    (tmp_path / "memory.max").write_text("1\n")
    monkeypatch.setattr(probe_host, "PROC", tmp_path)
    assert (probe_host.memory_cgroup().ok, probe_host.memory_cgroup().value) == (False, 4096)
    (tmp_path / "fs/a/memory.max").write_text("max\n")
    assert (probe_host.memory_cgroup().ok, probe_host.memory_cgroup().value) == (True, "unlimited")


def test_the_fd_store_is_what_the_service_manager_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for told, ok in (("512", True), ("0", False)):
        monkeypatch.setenv("FDSTORE", told)
        assert probe_host.fd_store() == Finding(ok, told, "$FDSTORE")
    monkeypatch.delenv("FDSTORE")
    assert probe_host.fd_store().ok is None


# Without rights


def test_nobody_gets_answers(report: dict[str, Any]) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become nobody")
    as_nobody = ask(AS_NOBODY)
    assert as_nobody["user"] == NOBODY
    device = os.stat("/dev/userfaultfd").st_mode & 0o006 == 0o006 if os.path.exists("/dev/userfaultfd") else False
    switch = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1"
    access = check_of(as_nobody, "userfaultfd.access")
    assert access["ok"] == (device or switch)
    if not access["ok"]:
        refusal = "EACCES" if os.path.exists("/dev/userfaultfd") else "ENOENT"
        assert refusal in check_of(as_nobody, "userfaultfd.device")["why"]
        assert "EPERM" in check_of(as_nobody, "userfaultfd.syscall")["why"]
        assert "lacks CAP_SYS_PTRACE" in check_of(as_nobody, "userfaultfd.syscall")["why"]
        assert as_nobody["backings"]["memfd"]["why"].startswith("userfaultfd.access: ")
        # A userfaultfd of user mode only lets the kernel's faults, and so KVM's, end in an error.
        assert check_of(as_nobody, "memfd.minor")["value"] == "refused"
    # What needs no rights is found to be the same.
    for name in ("memfd.populate_write", "memfd.populate_copy", "process.pidfd", "network.ktls", "cpu.crc32c"):
        assert check_of(as_nobody, name)["ok"] == check_of(report, name)["ok"]


def test_root_of_a_user_namespace_gets_answers(require_command: Callable[[str], str]) -> None:
    enter = [require_command("unshare"), "--user", "--map-root-user"]
    if subprocess.run([*enter, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no user namespace can be made here")
    inside = ask(DOCTOR.format(json=True), *enter)
    assert check_of(inside, "sandbox.user_namespace")["ok"] is False
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "0":
        assert check_of(inside, "userfaultfd.syscall")["ok"] is False


@pytest.mark.parametrize(("verdict", "seen"), [("errno", "EPERM"), ("kill", "SIGSYS")])
def test_a_seccomp_filter_shows_in_what_it_refuses_and_only_there(
    verdict: str, seen: str, report: dict[str, Any], tool: Callable[[str], str]
) -> None:
    filtered = ask(DOCTOR.format(json=True), tool("deny"), verdict)
    for name in ("userfaultfd.syscall", "userfaultfd.user_mode"):
        assert check_of(filtered, name)["ok"] is False
        assert seen in check_of(filtered, name)["why"]
    assert check_of(filtered, "sandbox.seccomp")["ok"] is False
    if check_of(report, "userfaultfd.device")["ok"]:
        before, after = verdicts(report), verdicts(filtered)
        assert {name for name in CHECKS if before[name] != after[name]} <= {
            "userfaultfd.syscall",
            "userfaultfd.user_mode",
            "sandbox.seccomp",
        }


# Whether it stays out of the way


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_leaves_nothing_behind(name: str) -> None:
    """Run in this process, twice; the fixture of all tests looks for descriptors and threads."""
    first, second = CHECKS[name].try_it(), CHECKS[name].try_it()
    assert first.ok == second.ok
    assert isinstance(first.why, str)
    json.dumps(first.value)


def test_a_check_that_dies_hangs_or_breaks_is_an_answer_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_apart, "DEADLINE", 0.5)

    def die(number: signal.Signals) -> Finding:
        signal.raise_signal(number)
        raise AssertionError(number)

    def hang() -> Finding:
        threading.Event().wait()
        raise AssertionError("it went on")

    def fail() -> Finding:
        raise FileNotFoundError(errno.ENOENT, "", "/proc/nothing")

    def blunder() -> Finding:
        raise ZeroDivisionError

    deeds: dict[str, Callable[[], Finding]] = {
        "first": lambda: Finding(True, ["a"]),
        "filtered": partial(die, signal.SIGSYS),
        "killed": partial(die, signal.SIGKILL),
        "hung": hang,
        "failed": fail,
        "blundered": blunder,
        "last": lambda: Finding(False, 5, "so"),
    }
    found = probe_apart.survey(Check(name, deed, "", "") for name, deed in deeds.items())
    assert found == {
        "first": Finding(True, ["a"]),
        "filtered": Finding(False, None, "a seccomp filter kills who tries: SIGSYS"),
        "killed": Finding(None, None, "it ended the process that tried: SIGKILL"),
        "hung": Finding(None, None, "it hung: given up after 0.5 s"),
        "failed": Finding(None, None, "/proc/nothing: ENOENT (No such file or directory)"),
        "blundered": Finding(None, None, "a bug in gmemd: ZeroDivisionError()"),
        "last": Finding(False, 5, "so"),
    }


# How it judges

YES, NO, UNTRIED = Finding(True), Finding(False, None, "no"), Finding(None, None, "untried")
GOOD = {
    "userfaultfd.access": YES,
    "guest_memfd.missing_minor": YES,
    "guest_memfd.minor": YES,
    "guest_memfd.absent_in_minor": YES,
    "guest_memfd.populate_write": YES,
    "guest_memfd.populate_recv": YES,
    "guest_memfd.populate_copy": YES,
    "guest_memfd.pin": YES,
    "kvm.guest_memfd_slot": YES,
    "kvm.userfault": YES,
}


def judge(backing: str, **changes: Finding) -> probe.Ability:
    found = GOOD | {f"guest_memfd.{name}": finding for name, finding in changes.items()}
    return ability(backing, found.__getitem__)


def test_both_modes_are_preferred_to_minor_alone() -> None:
    assert judge("guest_memfd") == probe.Ability(True, "missing+minor", ("write", "recv", "copy"), "")
    assert judge("guest_memfd", missing_minor=NO).trap == "minor"
    assert judge("guest_memfd", missing_minor=NO).ok is True


def test_minor_that_lets_absent_pages_through_is_not_enough() -> None:
    judged = judge("guest_memfd", missing_minor=NO, absent_in_minor=NO)
    assert judged == probe.Ability(False, None, ("write", "recv", "copy"), "faults: no")


def test_one_way_to_populate_is_enough_and_none_is_not() -> None:
    assert judge("guest_memfd", populate_write=NO, populate_recv=NO).populate == ("copy",)
    assert judge("guest_memfd", populate_write=NO, populate_recv=NO).ok is True
    assert judge("guest_memfd", populate_write=NO, populate_recv=NO, populate_copy=NO).ok is False


def test_a_no_outweighs_what_could_not_be_tried() -> None:
    assert judge("guest_memfd", missing_minor=UNTRIED, minor=UNTRIED).ok is None
    assert judge("guest_memfd", missing_minor=UNTRIED, minor=UNTRIED, pin=NO).why == "guest_memfd.pin: no"


def test_a_plain_slot_has_to_be_pinned_and_kvm_userfault_does_not() -> None:
    assert judge("guest_memfd", pin=NO).ok is False
    assert judge("guest_memfd_userfault", pin=NO).ok is True


def test_what_the_functions_try_is_what_the_doctor_tells(report: dict[str, Any]) -> None:
    functions = (
        probe.memfd,
        probe.hugetlb,
        probe.guest_memfd,
        probe.guest_memfd_userfault,
        probe.guest_memfd_no_direct_map,
    )
    for function in functions:
        told = report["backings"][function.__name__]
        tried = function()
        assert (tried.ok, tried.trap, list(tried.populate)) == (told["ok"], told["trap"], told["populate"])
