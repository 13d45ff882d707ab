"""The command lines: options that make no sense, exit codes, and one line for each error."""

import contextlib
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from support.polling import PATIENCE, eventually
from support.vmm import PAGE

from gmemd import cli, config, log, mending, source_cli, status
from gmemd.errors import KernelError, UnavailableError
from gmemd.probe import Finding
from gmemd_tools import room
from gmemd_tools.demo.plan import Plan

GMEMD, SOURCE = cli.main, source_cli.main


class Told(NamedTuple):
    """How a command ended: exit code, stdout, stderr."""

    code: int
    out: str
    errors: str


Run = Callable[..., Told]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(main, argument, …)` in this process."""
    monkeypatch.setattr(log, "set_up", lambda *_: None)  # pytest's own handlers stay

    def run(main: Callable[[list[str]], int], *arguments: str | Path) -> Told:
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        return Told(code, *capsys.readouterr())

    return run


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("dance",), "argument COMMAND: invalid choice: 'dance'"),
        (("serve", "--port", "1"), "unrecognized arguments: --port 1"),
        (("abandon",), "the following arguments are required: ID"),
        (("demo", "--memory", "1.5G"), "--memory 1.5G: must be a size"),
        (("demo", "--memory", "0"), "--memory 0: from 1M to 512G, a multiple of 4K"),
        (("demo", "--memory", "4194305"), "--memory 4194305: from 1M to 512G, a multiple of 4K"),
        (("demo", "--memory", "1T"), "--memory 1T: from 1M to 512G, a multiple of 4K"),
        (("demo", "--regions", "0"), "--regions 0: 1 to 64"),
        (("demo", "--vcpus", "9"), "--vcpus 9: 1 to 8"),
        (("demo", "--seed", "-1"), "--seed -1: 0 to 18446744073709551615"),
    ],
)
def test_gmemd_asked_wrongly(run: Run, arguments: Sequence[str], error: str) -> None:
    told = run(GMEMD, *arguments)
    assert (told.code, told.out) == (os.EX_USAGE, "")
    assert error in told.errors


BASE = ("127.0.0.1:1", "--migration", "m", "--file", "/dev/null")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (BASE[:3], "one of the arguments --vmm --file is required"),
        (("127.0.0.1:1", *BASE[3:]), "the following arguments are required: --migration"),
        ((*BASE, "--vmm", "/x"), "argument --vmm: not allowed with argument --file"),
        (("127.0.0.1:99999", *BASE[1:]), "127.0.0.1:99999: must be host:port"),
        (("[::1:1", *BASE[1:]), "[::1:1: must be host:port"),
        ((BASE[0], "--migration", "a/b", *BASE[3:]), "--migration 'a/b': 1 to 63 of letters, digits and -_."),
        ((BASE[0], "--migration", "", *BASE[3:]), "--migration '': 1 to 63"),
        ((*BASE, "--lanes", "0"), "--lanes 0: 1 to 15"),
        ((*BASE, "--lanes", "16"), "--lanes 16: 1 to 15"),
        ((*BASE, "--lanes", "x"), "argument --lanes: invalid int value: 'x'"),
        ((*BASE, "--poll-us", "-1"), "--poll-us -1: 0 to 1000"),
        ((*BASE, "--gpa", "top"), "argument --gpa: invalid address value: 'top'"),
        ((*BASE, "--gpa", "-4096"), "--gpa -0x1000: 0 to 2^63 - 1"),
        ((*BASE, "--gpa", "0x8000000000000000"), "--gpa 0x8000000000000000: 0 to 2^63 - 1"),
        ((*BASE, "--rate", "fast"), "--rate fast: must be a size"),
        ((*BASE, "--patience", "-1"), "--patience -1.0: 0 or more"),
        ((*BASE, "--patience", "nan"), "--patience nan: 0 or more"),
        (
            (*BASE, "--certificate", "/c.pem"),
            "--certificate, --key and --ca go together: --key and --ca must be given, too",
        ),
        ((*BASE, "--crl", "/c.pem"), "--crl is of certificates: --certificate, --key and --ca must be given, too"),
    ],
)
def test_gmemd_source_asked_wrongly(run: Run, arguments: Sequence[str], error: str) -> None:
    told = run(SOURCE, *arguments)
    assert (told.code, told.out) == (os.EX_USAGE, "")
    assert error in told.errors
    assert "Traceback" not in told.errors


def write(path: Path, size: int) -> Path:
    path.write_bytes(bytes(size))
    return path


def test_files_that_hold_no_memory(run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    files = {
        tmp_path / "nowhere": "No such file or directory",
        tmp_path: "not a file that holds memory",
        tmp_path / "fifo": "not a file that holds memory",
        Path("/dev/zero"): "not a file that holds memory",
        write(tmp_path / "empty", 0): "0 bytes, not whole pages of 4096",
        write(tmp_path / "odd", PAGE + 1): "4097 bytes, not whole pages of 4096",
    }
    for path, error in files.items():
        told = run(SOURCE, "127.0.0.1:1", "--migration", "m", "--file", path)
        assert (told.code, told.out) == (os.EX_DATAERR, "")
        assert told.errors == f"gmemd-source: {path}: {error}\n"


@pytest.mark.parametrize(
    ("host", "error"),
    [
        ("127.0.0.1", r"127\.0\.0\.1:{port}: cannot connect: Connection refused"),
        ("[::1]", r"\[::1\]:{port}: cannot connect: .*"),
        ("nobody.invalid", r"nobody\.invalid:{port}: cannot connect: .*"),
        ("a..b", r"a\.\.b:{port}: cannot connect: .*label empty or too long.*"),
    ],
)
def test_nobody_listens(run: Run, tmp_path: Path, host: str, error: str, expect_log: Callable[[str], None]) -> None:
    if "1" not in host:
        expect_log(f"guest memory goes to {re.escape(host)} as plain text, to whoever answers there")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # and never listens
        port = sock.getsockname()[1]
        path = write(tmp_path / "memory", PAGE)
        plain = ("--tls", "off", "--plain-text-on-network")
        told = run(SOURCE, f"{host}:{port}", "--migration", "m", "--file", path, "--patience", "0", *plain)
    assert (told.code, told.out) == (os.EX_TEMPFAIL, "")
    assert re.fullmatch("gmemd-source: " + error.format(port=port) + "\n", told.errors)


def test_what_holds_a_source_up_is_told(tmp_path: Path) -> None:
    file = tmp_path / "memory"
    file.write_bytes(bytes(PAGE))
    command = [sys.executable, "-m", "gmemd.source_cli", "127.0.0.1:1", "--migration", "m", "--file", str(file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as source:
        assert source.stderr
        told = "gmemd: warning: 127.0.0.1:1: cannot connect: Connection refused; still trying\n"
        assert source.stderr.readline() == told
        source.terminate()
        assert source.wait(PATIENCE) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[network]\nlistne = '127.0.0.1:1'\n", "[network] listne: no such key; the nearest is listen in [network]"),
        ("[netwrok]\n", "netwrok: no such table; the nearest is [network]"),
        ("[network]\nlisten = 5\n", "[network] listen = 5: must be a string"),
        (
            "[daemon]\nsocket_group = 'nobody-is-called-so'\n",
            '[daemon] socket_group = "nobody-is-called-so": no such group on this host: ',
        ),
        ("[vmms]\n'web-*' = ['root', 'x-y']\n", '[vmms] web-* = ["root", "x-y"]: no user x-y on this host: '),
        ("x", "Expected '=' after a key"),
    ],
)
def test_a_wrong_configuration(run: Run, tmp_path: Path, text: str, error: str) -> None:
    path = tmp_path / "gmemd.toml"
    sockets = f"socket = '{tmp_path}/a'\nstatus_socket = '{tmp_path}/b'\n"
    path.write_text(text.replace("[daemon]\n", f"[daemon]\n{sockets}"))
    told = run(GMEMD, "serve", "--config", path)
    assert (told.code, told.out) == (os.EX_CONFIG, "")
    assert error in told.errors
    assert told.errors.startswith(f"gmemd: {path}: ")
    assert told.errors.count("\n") == 1


def test_a_wrong_configuration_while_guests_are_kept(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit code of a wrong configuration would have the service manager give up, and let go of them."""
    (tmp_path / "gmemd.toml").write_text("[netwrok]\n")
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setattr(mending, "LONGEST", 0.0)
    for names, code in {
        "handoff:status": os.EX_CONFIG,
        "handoff:ended.m": os.EX_CONFIG,
        "handoff:fd0.m:vmm.m:state.m": os.EX_UNAVAILABLE,
    }.items():
        monkeypatch.setenv("LISTEN_FDNAMES", names)
        told = run(GMEMD, "serve", "--config", tmp_path / "gmemd.toml")
        assert (told.code, told.errors.count("\n")) == (code, 1)
        assert "netwrok: no such table" in told.errors
        assert ("guests are kept for us" in told.errors) == (code == os.EX_UNAVAILABLE)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KernelError("userfaultfd: no"), os.EX_OSERR),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), os.EX_UNAVAILABLE),
    ],
)
def test_what_keeps_a_daemon_from_starting_while_guests_are_kept(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    """It is not started again at once, ten times a second."""

    def fail(_: object) -> int:
        raise error

    waited: list[float] = []
    monkeypatch.setattr(cli, "_serve", fail)
    monkeypatch.setattr(mending, "wait", lambda _, longest: waited.append(longest))
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDNAMES", "handoff:state.m")
    told = run(GMEMD, "serve", "--config", tmp_path / "gmemd.toml")
    assert (told.code, waited) == (code, [mending.SOON])
    assert "; guests are kept for us: " in told.errors


def test_a_configuration_that_is_not_there(run: Run, tmp_path: Path) -> None:
    told = run(GMEMD, "serve", "--config", tmp_path / "nowhere")
    assert (told.code, told.errors) == (
        os.EX_CONFIG,
        f"gmemd: {tmp_path}/nowhere: No such file or directory\n",
    )


def test_the_configuration_in_effect_is_shown(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "gmemd.toml"
    path.write_text("[network]\ndead_after = 2.5\n")
    told = run(GMEMD, "serve", "--config", path, "--dump-config")
    assert told.code == 0
    assert config.parse(told.out) == config.load(path)


@pytest.mark.parametrize("command", [("status",), ("status", "--json"), ("abandon", "m")])
def test_no_daemon_answers(run: Run, tmp_path: Path, command: tuple[str, ...]) -> None:
    told = run(GMEMD, command[0], "--socket", tmp_path / "sock", *command[1:])
    assert (told.code, told.out) == (os.EX_UNAVAILABLE, "")
    assert told.errors == f"gmemd: {tmp_path}/sock: no daemon answers: No such file or directory\n"


@pytest.mark.parametrize(
    ("answer", "code", "error"),
    [(other, os.EX_DATAERR, "not an answer of gmemd: ") for other in (b"HTTP/1.1 400\r\n", b"[]\n", b"7\n")]
    + [(part, os.EX_UNAVAILABLE, "the daemon hung up: ") for part in (b"", b'{"version": "0.1')],
)
def test_something_else_answers(tmp_path: Path, answer: bytes, code: int, error: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
        listener.listen()
        command = [sys.executable, "-m", "gmemd.cli", "status", "--socket", str(tmp_path / "sock")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            connection, _ = listener.accept()
            with connection:
                assert json.loads(connection.recv(4096)) == {"command": "status"}
                connection.sendall(answer)
            out, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (code, "")
    assert errors.startswith(f"gmemd: {tmp_path}/sock: {error}")


def test_demos_that_do_not_fit(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "available_memory", lambda: Finding(True, 1 << 30, ""))
    told = run(GMEMD, "demo", "--memory", "513M")
    assert told.code == os.EX_UNAVAILABLE
    assert told.errors == "gmemd: --memory 513M: this host has no room for that twice: 1024 MiB are free\n"
    file = tmp_path / "file"
    file.touch()
    told = run(GMEMD, "demo", "--memory", "16M", "--trace", file)
    assert told.code == os.EX_DATAERR
    assert told.errors == f"gmemd: {file}: File exists: not a directory to record in\n"
    monkeypatch.setattr(tempfile, "tempdir", os.fspath(long := tmp_path / ("long" * 25)))
    long.mkdir()
    told = run(GMEMD, "demo", "--memory", "16M")
    assert told.code == os.EX_UNAVAILABLE
    assert re.search("too long for the paths of sockets in it: set TMPDIR to a shorter one$", told.errors)


def running(folder: Path) -> bool:
    """Whether the demo's guest there has moved, and lacks pages."""
    for path in folder.glob("gmemd-demo-*/status.sock"):
        with contextlib.suppress(UnavailableError):
            return any(m["phase"] == "running" for m in status.ask(path, {"command": "status"})["migrations"])
    return False


def of_folder(folder: Path) -> dict[int, bytes]:
    """The processes whose command lines name it."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found[int(path.parent.name)] = path.read_bytes()
    return {process: command for process, command in found.items() if os.fsencode(folder) in command}


@contextlib.contextmanager
def slow_demo(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """One whose guest has moved and lacks pages; it leaves nothing behind."""
    options = ("--memory", "16M", "--guest", "threads", "--network", "rate=1M")
    command = [sys.executable, "-m", "gmemd.cli", "demo", *options]
    environ = os.environ | {"TMPDIR": str(folder)}
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as demo:
        eventually(lambda: running(folder))
        yield demo
    eventually(lambda: not of_folder(folder))
    assert not list(folder.iterdir())


def test_a_demo_that_is_told_to_end_leaves_nothing(tmp_path: Path) -> None:
    with slow_demo(tmp_path) as demo:
        demo.terminate()
        assert demo.wait(PATIENCE) == 128 + signal.SIGTERM


@pytest.mark.parametrize(("part", "word"), [("sender", b"gmemd.source_cli"), ("daemon", b"serve")])
def test_a_demo_whose_part_ends_says_which(tmp_path: Path, part: str, word: bytes) -> None:
    with slow_demo(tmp_path) as demo:
        [process] = [each for each, line in of_folder(tmp_path).items() if word in line.split(b"\0")]
        os.kill(process, signal.SIGKILL)
        _, errors = demo.communicate(timeout=PATIENCE)
        assert demo.returncode == os.EX_UNAVAILABLE
        assert f"gmemd: {part} was ended by SIGKILL: " in errors


def test_a_demo_whose_daemon_does_not_start_ends_as_that(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "daemon", lambda _: ["serve", "--config", "/nowhere"])
    told = run(GMEMD, "demo", "--memory", "16M", "--guest", "threads")
    assert told.code == os.EX_CONFIG
    assert "gmemd: daemon ended with 78: gmemd: /nowhere: No such file or directory\n" in told.errors


@pytest.mark.parametrize("main", [GMEMD, SOURCE], ids=["gmemd", "gmemd-source"])
def test_help_and_version(run: Run, main: Callable[[list[str]], int]) -> None:
    assert run(main, "--help").code == 0
    assert re.fullmatch(r"gmemd(-source)? \d+\.\d+\.\d+\n", run(main, "--version").out)


def test_an_error_is_one_line_of_a_process_too() -> None:
    command = [sys.executable, "-m", "gmemd.source_cli", "127.0.0.1:1", "--migration", "m", "--file", "/nowhere"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (told.returncode, told.stdout) == (os.EX_DATAERR, "")
    assert told.stderr == "gmemd-source: /nowhere: No such file or directory\n"


def told_by_shell(line: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """What a shell's line says; `gmemd` is ours."""
    ours = f'python() {{ {sys.executable} "$@"; }}; gmemd() {{ python -m gmemd.cli "$@"; }}\n'
    environ = os.environ | {"TMPDIR": str(directory)}
    return subprocess.run(["bash", "-c", ours + line], env=environ, capture_output=True, text=True, timeout=PATIENCE)


def test_nothing_can_be_written(tmp_path: Path) -> None:
    told = told_by_shell("gmemd serve --dump-config >/dev/full", tmp_path)
    assert told.returncode == os.EX_UNAVAILABLE
    assert told.stderr == "gmemd: No space left on device: free some space\n"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("gmemd status --socket /nowhere 2>/dev/full", os.EX_UNAVAILABLE),
        ("gmemd serve --config /nowhere 2>/dev/full", os.EX_CONFIG),
        ("gmemd dance 2>/dev/full", os.EX_USAGE),
        ("gmemd --version >/dev/full", os.EX_UNAVAILABLE),
        ("gmemd --help | true; exit ${PIPESTATUS[0]}", 128 + signal.SIGPIPE),
    ],
)
def test_the_exit_code_stands_though_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, code: int
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # with it, argparse keeps a disk that is full to itself
    told = told_by_shell(line, tmp_path)
    assert (told.returncode, told.stdout) == (code, "")
    assert told.stderr in ("", "gmemd: No space left on device: free some space\n")


def test_nobody_reads_any_more(tmp_path: Path) -> None:
    told = told_by_shell("gmemd serve --dump-config | true; exit ${PIPESTATUS[0]}", tmp_path)
    assert (told.returncode, told.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(tmp_path: Path, closed: str) -> None:
    """What is told goes nowhere else instead, and no file takes their place."""
    refused = told_by_shell(f"gmemd status --socket {tmp_path} {closed}", tmp_path)
    assert (refused.returncode, refused.stdout) == (os.EX_UNAVAILABLE, "")
    opened = "import os, sys; from gmemd import streams; streams.mend(); sys.exit(os.open('/dev/null', os.O_RDONLY))"
    assert told_by_shell(f'python -c "{opened}" {closed}', tmp_path).returncode > 2


def test_a_locale_without_the_letter() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "gmemd.source_cli", "--help"],
        env={"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=PATIENCE,
        cwd=Path(cli.__file__).parents[1],
    )
    assert told.returncode == 0
    assert rb"in \xb5s" in told.stdout


@pytest.mark.parametrize(("limit", "line"), [(7, "gmemd serve"), (16, "gmemd demo --memory 16M")])
def test_too_few_descriptors(tmp_path: Path, limit: int, line: str) -> None:
    """For the event loop itself, and for a process that one of its tasks starts."""
    told = told_by_shell(f"ulimit -n {limit}; {line}", tmp_path)
    assert told.returncode == os.EX_UNAVAILABLE, told.stderr
    assert re.fullmatch("gmemd: .*Too many open files: raise the limit of descriptors .*\n", told.stderr)
