"""The runner itself, from outside: what a command gets of it, and how each end is told."""

import os
import select
import signal
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / "tools/lab/run"
INSIDE = Path("/run/lab-command")
ABSENT, UNAVAILABLE, KERNEL_FAILED, OUT_OF_TIME = os.EX_NOINPUT, os.EX_UNAVAILABLE, os.EX_SOFTWARE, 124
SECONDS = 120  # for a boot of 2 seconds, on a host that does something else

pytestmark = pytest.mark.skipif(INSIDE.exists(), reason="an emulated machine in an emulated machine")

WARN = 'for line in "------------[ cut here ]------------" "WARNING: of the test"; do echo "<4>$line" >/dev/kmsg; done'


def lab(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run([RUN, *arguments], capture_output=True, timeout=SECONDS, cwd=cwd)
    if done.returncode == UNAVAILABLE:
        pytest.skip(done.stderr.decode().strip())
    return done


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Where the command runs: hidden by the fresh /tmp unless the runner shows it, and hard to quote."""
    path = tmp_path / "a 'folder', with $HOME in it"
    (path / "out").mkdir(parents=True)
    (path / "input").write_text("from the host")
    return path


def test_a_command_gets_its_arguments_its_folders_its_variables(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_GIVEN", "one 'two'")
    monkeypatch.setenv("LAB_KEPT_BACK", "1")
    script = (
        'printf "%s|" "$@" "$LAB_GIVEN" "$LAB_SET" "$LAB_KEPT_BACK" "$PWD"; cat input; '
        'cp input out/copy; if touch new; then exit 1; fi 2>/dev/null; echo "not out" >&2; exit 7'
    )
    options = ["-e", "LAB_GIVEN", "-e", "LAB_SET=3=4", "-e", "LAB_ABSENT", "-w", "out"]
    done = lab(*options, "--", "sh", "-c", script, "sh", "a  b", "'\"\\", "", cwd=clone)
    assert done.stdout.decode() == f"a  b|'\"\\||one 'two'|3=4||{clone}|from the host"
    assert done.stderr == b"not out\n"
    assert done.returncode == 7
    assert (clone / "out/copy").read_text() == "from the host"
    assert not (clone / "new").exists()


def test_output_is_what_was_written(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_bytes(b"before ")
    sent = bytes(range(256)) * 4096
    (tmp_path / "sent").write_bytes(sent)
    with kept.open("ab") as output:
        done = subprocess.run([RUN, "--", "cat", "sent"], stdout=output, cwd=tmp_path, timeout=SECONDS)
    if done.returncode == UNAVAILABLE:
        pytest.skip("no kernel or no QEMU")
    assert kept.read_bytes() == b"before " + sent


def test_what_a_command_leaves_behind_holds_nothing_up() -> None:
    assert lab("--", "sh", "-c", "sleep 1000 & setsid sleep 1000 & exit 3").returncode == 3


def test_a_machine_is_there_for_vcpus() -> None:
    done = lab("--", "sh", "-c", "test -w /dev/kvm && test -w /dev/userfaultfd && unshare -Ur true")
    assert done.returncode == 0, done.stderr


def test_a_warning_of_the_kernel_is_a_failure() -> None:
    done = lab("--", "sh", "-c", WARN)
    assert done.returncode == KERNEL_FAILED
    assert b"WARNING: of the test" in done.stderr


def test_a_warning_may_be_allowed() -> None:
    assert lab("-W", "--", "sh", "-c", f"{WARN}; exit 5").returncode == 5


def test_a_kernel_that_stops_is_told_from_a_command_that_fails() -> None:
    done = lab("--", "busybox", "poweroff", "-f")
    assert done.returncode == KERNEL_FAILED
    assert b"the kernel stopped before the command ended" in done.stderr


def test_time_runs_out_for_a_command_that_never_stops_to_write() -> None:
    done = lab("-t", "5", "--", "sh", "-c", "while :; do echo; done")
    assert done.returncode == OUT_OF_TIME
    assert b"not done after 5 s" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_machine_outlives_its_runner(number: signal.Signals) -> None:
    with subprocess.Popen([RUN, "--", "sh", "-c", "echo up; sleep 1000"], stdout=subprocess.PIPE) as runner:
        assert runner.stdout is not None
        if runner.stdout.readline() != b"up\n":
            pytest.skip("no kernel or no QEMU")
        (machine,) = Path(f"/proc/{runner.pid}/task/{runner.pid}/children").read_text().split()
        watch = os.pidfd_open(int(machine))
        runner.send_signal(number)
        gone, _, _ = select.select([watch], [], [], SECONDS)
        os.close(watch)
        assert gone
        assert runner.wait(SECONDS) == -number


def test_a_kernel_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMEMD_LAB_KERNEL", "/no/kernel")
    done = lab("--", "true")
    assert done.returncode == ABSENT
    assert b"/no/kernel" in done.stderr
