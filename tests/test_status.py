"""What `gmemd status` shows: how fast it goes, who waits and for how long; live on a terminal, and as JSON."""

import json
import os
import pty
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path

import pytest
import trio
import trio.testing
from rich.text import Text
from support.connection import PAGES, frame
from support.daemon import DaemonProcess
from support.polling import PATIENCE, eventually
from support.rawsource import RawSource
from support.vmm import PAGE, Vmm

from gmemd import showstatus, status
from gmemd.errors import DataError
from gmemd.places import Places
from gmemd.rates import WINDOW, Rates, Sample, Speed
from gmemd.registry import Finished, Registry
from gmemd.show import show

COUNT = 64
REGIONS = [[0, COUNT, 12]]
THREAD_ID = 1 << 8
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    # The sources played here give no sign of life.
    with DaemonProcess(tmp_path_factory.mktemp("daemon"), "heartbeat = 10\ndead_after = 60\n") as daemon:
        yield daemon
        assert daemon.stop() == 0


class Terminal:
    """A command on a terminal of its own, and what it has shown there without colours and movements."""

    def __init__(self, *command: str) -> None:
        self.screen, end = pty.openpty()
        ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 40, 110, 0, 0))
        environ = os.environ | {"TERM": "xterm", "COLUMNS": "110", "LINES": "40"}
        # As a shell starts what it runs in the foreground, whatever we run in.
        words = ["env", "--default-signal=INT", *command]
        self.process = subprocess.Popen(words, stdin=end, stdout=end, stderr=end, env=environ, start_new_session=True)
        os.close(end)
        self.shown = ""

    def until(self, pattern: str) -> re.Match[str]:
        """Waits until it has shown that, and forgets all before."""
        end = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, ESCAPES.sub("", self.shown))):
            ready, _, _ = select.select([self.screen], [], [], end - time.monotonic())
            assert ready, f"never shown: {pattern}\n{ESCAPES.sub('', self.shown)[-2000:]}"
            self.shown += os.read(self.screen, 65536).decode(errors="replace")
        self.shown = ESCAPES.sub("", self.shown)[found.end() :]
        return found

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.screen)


def command(daemon: DaemonProcess, *options: str) -> list[str]:
    return [sys.executable, "-m", "gmemd.cli", "status", "--socket", str(daemon.status_socket), *options]


def test_watch_on_a_terminal(daemon: DaemonProcess, rng: random.Random) -> None:
    """A guest in the middle of its migration, with one thread that waits; then that the page came; then the end."""
    content = rng.randbytes(COUNT * PAGE)
    with Vmm(len(content), features=THREAD_ID) as vmm, RawSource(daemon.port, "watched", REGIONS) as source:
        vmm.hand_off(daemon.socket, "watched")
        source.join().switch()
        vmm.expect("ready")
        source.background.socket.sendall(frame(PAGES, 0, 0, 16, content[: 16 * PAGE]))
        touch = vmm.touch(20)
        source.urgent.read_frame()
        terminal = Terminal(*command(daemon, "--watch"))
        try:
            terminal.until(r"watched +running +\S+ +25\.0 % of 256 KiB")
            terminal.until(r"faults +1,")
            terminal.until(r"lanes +urgent 1; recoveries 0")
            terminal.until(rf"waits 1 +.*thread {touch.native_id} \(.+\) +region 0, page 20")
            terminal.until(rf"blocked +thread {touch.native_id} .* in 1 waits, longest")
            source.urgent.socket.sendall(frame(PAGES, 0, 20, 1, content[20 * PAGE : 21 * PAGE]))
            assert touch.result() == content[20 * PAGE : 21 * PAGE]
            terminal.until(r"watched +running +\S+ +26\.6 % of 256 KiB")
            source.background.socket.sendall(frame(PAGES, 0, 0, 64, content))
            vmm.expect("done")
            terminal.until(r"ended +how[^\n]*\n *watched +complete +256 KiB")
            assert terminal.interrupt() == 130
        finally:
            terminal.close()


def test_what_is_no_terminal_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show(Text("a long line " * 100))
    assert capsys.readouterr().out == ("a long line " * 100).rstrip() + "\n"


def test_watch_for_programs_outlives_a_daemon(tmp_path: Path) -> None:
    """One that answers, one that ends before it has, and one after it."""
    path = tmp_path / "sock"
    watch = [sys.executable, "-m", "gmemd.cli", "status", "--socket", str(path), "--json", "--watch"]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            for answer, told in {
                b'{"pid": 1}\n': {"pid": 1},
                b'{"pi': {"error": f"{path}: the daemon hung up: it ends, or too many ask it at a time"},
                b'{"pid": 2}\n': {"pid": 2},
            }.items():
                connection, _ = listener.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(answer)
                assert json.loads(process.stdout.readline()) == told
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE) == 130


def test_threads_that_wait_are_told_with_what_they_have_waited(daemon: DaemonProcess, rng: random.Random) -> None:
    content = rng.randbytes(COUNT * PAGE)
    with Vmm(len(content), features=THREAD_ID) as vmm, RawSource(daemon.port, "threads", REGIONS) as source:
        vmm.hand_off(daemon.socket, "threads")
        source.join().switch()
        vmm.expect("ready")
        touches = []
        for page in (1, 2):
            touches.append(vmm.touch(page))
            source.urgent.read_frame()
        source.urgent.socket.sendall(frame(PAGES, 0, 2, 1, content[2 * PAGE : 3 * PAGE]))
        touches[1].result()
        eventually(lambda: daemon.migration("threads")["counters"]["waits"] == 1)
        waiting, done = daemon.migration("threads")["threads"]
        assert (waiting["thread"], done["thread"]) == (touches[0].native_id, touches[1].native_id)
        assert waiting["waiting_us"] == waiting["blocked_us"] == waiting["longest_us"] > done["blocked_us"] > 0
        assert (done["waiting_us"], done["waits"], done["vcpu"]) == (0, 1, False)
        run = subprocess.run(command(daemon, "--json"), capture_output=True, text=True, timeout=PATIENCE)
        (told,) = [m for m in json.loads(run.stdout)["migrations"] if m["migration"] == "threads"]
        assert told["threads"][0]["blocked_us"] > waiting["blocked_us"]
        source.background.socket.sendall(frame(PAGES, 0, 0, 64, content))
        vmm.expect("done")
        touches[0].result()


def test_all_keys_are_documented(daemon: DaemonProcess) -> None:
    document = (Path(__file__).parents[1] / "docs/operate.md").read_text()
    table = document.partition("<!-- keys -->")[2].partition("<!-- end keys -->")[0]
    listed = {key for row in table.splitlines() if row for key in re.findall(r"`(\w+)`", row.split("|")[1])}
    with Vmm(PAGE) as vmm:
        vmm.hand_off(daemon.socket, "keys")
        told = eventually(lambda: [m for m in daemon.status()["migrations"] if m["migration"] == "keys"])[0]
    assert listed == set(told)


def test_speed_is_that_of_the_last_seconds() -> None:
    rates = Rates()
    assert rates.speed(1, 1, 1) == Speed()
    for second in range(20):
        pages = 10 * second if second < 15 else 150
        rates.samples.append(Sample(float(second), pages, 4096 * pages, second))
    assert len(rates.samples) == WINDOW
    assert Speed.between(rates.samples[0], rates.samples[-1]) == Speed(0.0, 0.0, 1.0)
    assert Speed.between(Sample(0.0, 0, 0, 0), Sample(2.0, 10, 40960, 4)) == Speed(5.0, 20480.0, 2.0)
    assert Speed.between(Sample(1.0, 0, 0, 0), Sample(1.0, 9, 9, 9)) == Speed()


async def test_a_reader_that_stalls_is_dropped(autojump_clock: trio.testing.MockClock) -> None:
    """What it does not read is more than fits into the socket."""
    registry = Registry(1, 1)
    registry.remember(Finished("m", "complete", 1, [], 1, {"long": "x" * (1 << 20)}))
    ours, theirs = socket.socketpair()
    with theirs:
        ours.setblocking(False)
        theirs.sendall(b'{"command": "status"}\n')
        await status.serve(trio.SocketStream(trio.socket.from_stdlib_socket(ours)), registry, Places(1, 1))
        assert autojump_clock.current_time() == pytest.approx(status.TIMEOUT, abs=0.1)
        with pytest.raises(BrokenPipeError):
            theirs.send(b"x")


@pytest.mark.parametrize(
    ("us", "text"), [(0.4, "0 µs"), (999.4, "999 µs"), (1500, "1.5 ms"), (2_340_000, "2.3 s"), (7e9, "7000.0 s")]
)
def test_times_for_people(us: float, text: str) -> None:
    assert showstatus._time(us) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 29, "512 MiB"), (1 << 50, "1024 TiB")]
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert showstatus._size(size) == text


def test_a_daemon_of_another_version_is_no_traceback() -> None:
    told = {"migrations": [{"migration": "m"}], "finished": []}
    with pytest.raises(DataError, match="of another version that does not tell 'counters'"):
        showstatus.render(told)
