"""The replay harness: its traces, its threads, and whole replays against real processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
from support.pace import SLOWER
from support.polling import PATIENCE, eventually

from gmemd.errors import ConfigError, DataError, GmemdError, UnavailableError, UsageError
from gmemd.native import ffi, lib
from gmemd.native.memory import Region
from gmemd.trace import RECORD, TraceWriter, segments
from gmemd_tools.demo.processes import Process, Stage
from gmemd_tools.network.conditions import parse
from gmemd_tools.replay import patterns, runfile, summary
from gmemd_tools.replay.guest import Guest
from gmemd_tools.replay.recording import Recording, load
from gmemd_tools.replay.run import replay
from gmemd_tools.replay.setup import Setup
from gmemd_tools.replay.vmm import Receiver

PAGES = 16384  # 64 MiB
MILLISECOND = 10**6
Record = tuple[int, int, int, int, int]  # time in ns, page, thread, region, flags
Command = Callable[..., "subprocess.CompletedProcess[str]"]


def region(pages: int, page_size: int = 4096, gpa: int = 0) -> Region:
    return Region(offset=0, size=pages * page_size, page_size=page_size, gpa=gpa)


def write(path: Path, records: Sequence[Record], regions: Sequence[Region]) -> Path:
    with TraceWriter(path, "m", regions) as writer:
        writer.add(b"".join(RECORD.pack(*record) for record in records))
    return path


def plan(**values: Any) -> patterns.Plan:
    usual = {"pages": PAGES, "threads": 3, "faults": 2000, "gap_ns": 20_000, "writes": 0.3, "seed": 1}
    return patterns.Plan(**(usual | values))


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """`made(pattern, …)`: a trace of it."""

    def make(pattern: str, **values: Any) -> Path:
        wanted = plan(**values)
        path = tmp_path / f"{pattern}.gmtrace"
        with TraceWriter(path, "m", [region(wanted.pages)]) as writer:
            writer.add(patterns.synthesise(pattern, wanted))
        return path

    return make


@pytest.fixture
def command() -> Command:
    """`command(*arguments)`: runs gmemd-replay."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "gmemd_tools.replay.cli", *map(str, arguments)]
        return subprocess.run(words, text=True, capture_output=True, timeout=60 * SLOWER)

    return run


# Traces.


@pytest.mark.parametrize("pattern", patterns.PATTERNS)
def test_patterns(pattern: str) -> None:
    records = list(RECORD.iter_unpack(patterns.synthesise(pattern, plan(pages=1000))))
    assert len(records) == 2000
    assert all(0 <= page < 1000 for _, page, *_ in records)
    assert {thread for _, _, thread, *_ in records} == {1, 2, 3}
    assert all(before[0] <= after[0] for before, after in pairwise(records))
    assert 400 < sum(bool(flags & lib.GM_TRACE_WRITE) for *_, flags in records) < 800
    assert records == list(RECORD.iter_unpack(patterns.synthesise(pattern, plan(pages=1000))))
    assert records != list(RECORD.iter_unpack(patterns.synthesise(pattern, plan(pages=1000, seed=2))))


@pytest.mark.parametrize("pattern", patterns.PATTERNS)
def test_patterns_with_less_pages_than_threads(pattern: str) -> None:
    records = RECORD.iter_unpack(patterns.synthesise(pattern, plan(pages=2, threads=5, faults=50)))
    assert all(0 <= page < 2 for _, page, *_ in records)


def test_patterns_are_what_they_are_called(made: Callable[..., Path]) -> None:
    told = {name: summary.summarise(load([made(name, pages=4096)])) for name in patterns.PATTERNS}
    assert told["sequential"]["sequential"] > 0.99
    assert told["random"]["near"] < 0.05
    assert told["strided"]["sequential"] < 0.01
    assert told["strided"]["near"] > 0.95
    assert told["boot"]["sequential"] > 0.9
    assert told["zipf"]["hot_pages"][0]["faults"] > 5 * told["random"]["hot_pages"][0]["faults"]
    assert told["phased"]["pages_touched"] < told["random"]["pages_touched"]


def test_show(tmp_path: Path, command: Command) -> None:
    records = [
        (0, 5, 1, 0, 0),
        (1000, 6, 1, 0, lib.GM_TRACE_WRITE),
        (2000, 9, 2, 1, lib.GM_TRACE_MINOR),
        (5_000_000, 7, 1, 0, 0),
        (6_000_000, 6, 2, 0, 0),
    ]
    path = write(tmp_path / "t.gmtrace", records, [region(10), region(20, gpa=1 << 20)])
    shown = command("show", "--json", path)
    assert (shown.returncode, shown.stderr) == (0, "")
    told = json.loads(shown.stdout)
    assert told.pop("began").startswith("20")
    assert told == {
        "migration": "m",
        "faults": 5,
        "faults_lost": 0,
        "damaged_bytes": 0,
        "span_us": 6000.0,
        "faults_per_s": 833.3,
        "writes": 1,
        "minor": 1,
        "pages_touched": 4,
        "threads": [{"thread": 1, "faults": 3}, {"thread": 2, "faults": 2}],
        "regions": [
            {"gpa": 0, "pages": 10, "page_size": 4096, "faults": 4},
            {"gpa": 1 << 20, "pages": 20, "page_size": 4096, "faults": 1},
        ],
        "hot_pages": [
            {"region": 0, "page": 6, "faults": 2},
            {"region": 0, "page": 5, "faults": 1},
            {"region": 1, "page": 9, "faults": 1},
            {"region": 0, "page": 7, "faults": 1},
        ],
        "sequential": 0.4,
        "near": 0.4,
        "gaps_us": [
            {"from": 0, "gaps": 0},
            {"from": 1, "gaps": 1},
            *({"from": 1 << power, "gaps": 0} for power in range(1, 12)),
            {"from": 4096, "gaps": 2},
        ],
    }
    assert "5 in 0.006 s" in command("show", path).stdout


def test_load_refuses_what_does_not_belong_together(tmp_path: Path) -> None:
    one = write(tmp_path / "1.gmtrace", [(1000, 0, 1, 0, 0)], [region(10)])
    two = write(tmp_path / "2.gmtrace", [(2000, 0, 1, 0, 0)], [region(10)])
    other = write(tmp_path / "3.gmtrace", [(3000, 0, 1, 0, 0)], [region(11)])
    assert [record[0] for record in load([one, two])] == [1000, 2000]
    with pytest.raises(DataError, match=r"1.gmtrace: begins before the end of the file named before it"):
        load([two, one])
    with pytest.raises(DataError, match=r"3.gmtrace: region 0: pages 11 in the trace, 10 in the guest"):
        load([one, other])
    with pytest.raises(DataError, match="no faults in it"):
        load([write(tmp_path / "4.gmtrace", [], [region(10)])])


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["show", "none.gmtrace"], 65, "none.gmtrace: No such file or directory"),
        (["show", __file__], 65, "not a trace"),
        (["synth", "random", "-o", "/nowhere/t"], 65, "/nowhere/t: No such file or directory"),
        (["synth", "random", "--pages", "0", "-o", "t"], 64, "0: from 1 to"),
        (["run", "t", "--set", "poll_us=1"], 64, "must be TABLE.KEY=VALUE"),
        (["run", "t", "--network", "latency=5"], 64, "--network latency=5: '5' is no time"),
        (["compare", "t"], 64, "say what is different"),
        (["run", "t", "--speed", "2", "--flat-out"], 64, "not allowed with"),
    ],
)
def test_mistakes(command: Command, arguments: list[str], code: int, said: str) -> None:
    ended = command(*arguments)
    assert ended.returncode == code
    assert said in ended.stderr
    assert ended.stdout == ""


# Threads, with nobody in between: no userfaultfd is registered, so nothing waits.


@pytest.fixture
def guest() -> Iterator[Guest]:
    """One whose destination has its content from the beginning."""
    with Guest([region(64), region(16, gpa=1 << 20)], seed=5) as guest:
        guest.sent, guest.received = guest.received, guest.sent
        guest.fill()
        yield guest
        guest.sent, guest.received = guest.received, guest.sent


def play(guest: Guest, records: Sequence[Record], pace: float = 0.0) -> list[tuple[int, int, int]]:
    guest.ready()
    return guest.play(7, bytearray(b"".join(RECORD.pack(*record) for record in records)), 0, pace).touches


def words(guest: Guest, place: int, page: int) -> Any:
    return ffi.cast("uint64_t *", guest.regions[place].hva + page * 4096)


def test_content_is_decided_by_the_seed(guest: Guest) -> None:
    assert guest.verify() == 80
    pages = {bytes(ffi.buffer(words(guest, 0, page), 4096)) for page in range(64)}
    assert 50 < len(pages) < 64, "most differ, some are zero"


@pytest.mark.parametrize("index", [0, 1, 510, 511])
def test_wrong_word_is_found(guest: Guest, index: int) -> None:
    words(guest, 1, 3)[index] ^= 1 << 60
    with pytest.raises(DataError, match=f"wrong memory: region 1: page 3: word {index} is 0x"):
        play(guest, [(0, 2, 7, 1, 0), (0, 3, 7, 1, 0)])
    with pytest.raises(DataError, match=f"wrong memory: region 1: page 3: word {index} is 0x"):
        guest.verify()


def test_page_that_comes_again_over_a_written_one_is_found(guest: Guest) -> None:
    word = words(guest, 0, 9)
    before = word[511]
    play(guest, [(0, 9, 7, 0, lib.GM_TRACE_WRITE)] * 3)
    assert word[511] == before + 3
    guest.verify()
    word[511] = before
    with pytest.raises(DataError, match="region 0: page 9: word 511"):
        guest.verify()


def test_pace(guest: Guest) -> None:
    """No access is before its time."""
    start = time.monotonic_ns()
    touches = play(guest, [(step * MILLISECOND, step, 7, 0, 0) for step in range(20)], pace=2.0)
    assert all(began >= start + step * 2 * MILLISECOND for step, (began, _, _) in enumerate(touches))
    assert len(touches) == 20


def test_flat_out(guest: Guest) -> None:
    touches = play(guest, [(hour * 3600 * 10**9, hour, 7, 0, 0) for hour in range(20)])
    assert all(before[0] + before[1] <= after[0] for before, after in pairwise(touches))


def test_stop_ends_a_run(guest: Guest) -> None:
    guest.stop()
    assert play(guest, [(0, 0, 7, 0, 0), (3600 * 10**9, 1, 7, 0, 0)], pace=1.0) == []


# Whole replays.


def catches(process: int, which: signal.Signals) -> bool:
    caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (which - 1) & 1)


def test_a_recorder_to_which_no_vmm_comes(tmp_path: Path) -> None:
    (tmp_path / "memory").write_bytes(bytes(4096))
    what = ("--socket", tmp_path / "vmm.sock", "--file", tmp_path / "memory", "-o", tmp_path / "traces")
    command = [sys.executable, "-m", "gmemd_tools.replay.cli", "record", *map(str, what)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as recorder:
        eventually(lambda: catches(recorder.pid, signal.SIGTERM))
        recorder.terminate()
        _, errors = recorder.communicate(timeout=PATIENCE)
    assert recorder.returncode == os.EX_UNAVAILABLE
    assert errors.endswith(f"gmemd-replay: {tmp_path}/vmm.sock: no VMM has handed its memory over\n")


def faulted_pages(recording: Recording) -> dict[int, list[tuple[int, int]]]:
    """The faults of each thread in their order, as (region, page)."""
    found: dict[int, list[tuple[int, int]]] = {}
    for _, page, thread, place, _ in recording:
        found.setdefault(thread, []).append((place, page))
    return found


def only(recording: Recording, threads: set[int]) -> None:
    """Takes out what other threads did."""
    recording.records = bytearray(b"".join(RECORD.pack(*record) for record in recording if record[2] in threads))


def test_run(made: Callable[..., Path], command: Command) -> None:
    trace = made("zipf", faults=4000)
    ended = command("run", "--json", "--flat-out", trace)
    assert (ended.returncode, ended.stderr) == (0, "")
    told = json.loads(ended.stdout)
    assert told["ok"] is True
    assert told["pages"] == told["pages_verified"] == PAGES
    assert told["mismatches"] == 0
    assert told["touches"] == 4000
    assert [thread["thread"] for thread in told["threads"]] == [1, 2, 3]
    assert sum(thread["faults"] for thread in told["threads"]) == told["faults"] > 0
    for latency in (told["fault_latency_us"], told["touch_latency_us"]):
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["p999"] <= latency["max"]
        assert 0 < latency["mean"] < latency["max"]
    assert told["faults_per_s"] == pytest.approx(told["faults"] / told["duration_us"] * 1e6, rel=0.01)


def test_replay_of_a_recording_of_a_replay(tmp_path: Path, made: Callable[..., Path]) -> None:
    """Where nothing comes unasked, every thread faults on the same pages in the same order each time. make test-replay
    does it ten times."""
    first = load([made("sequential", pages=2048, threads=2, faults=1500)])
    settings = {"trace": {"directory": str(tmp_path / "traces")}}
    expected = faulted_pages(first)
    recording = first
    for _ in range(int(os.environ.get("GMEMD_REPLAYS", "2"))):
        told = replay(recording, Setup(speed=None, on_demand=True, settings=settings))
        recording = load(list(segments(tmp_path / "traces/replay.gmtrace").values())[-1:])
        assert recording.header.regions == first.header.regions
        faulted = faulted_pages(recording)
        pages = {thread["tid"]: faulted[thread["tid"]] for thread in told["threads"]}
        assert sorted(pages.values()) == sorted(expected.values())
        # What is left was touched at the end, by a thread that the trace did not have.
        assert sum(map(len, faulted.values())) == 2048
        only(recording, set(pages))


def test_replay_at_the_recorded_pace_with_several_regions(tmp_path: Path) -> None:
    regions = [region(100), region(3, gpa=1 << 30), region(1000, gpa=1 << 40)]
    pages = [(step % 3, step % regions[step % 3].pages) for step in range(1000)]
    records = [(step * MILLISECOND // 10, page, 1 + step % 2, place, 0) for step, (place, page) in enumerate(pages)]
    told = replay(load([write(tmp_path / "t.gmtrace", records, regions)]), Setup(speed=0.5))
    assert told["pages_verified"] == 1103
    assert told["duration_us"] >= 2 * told["recorded_us"] - 1000


def test_wrong_memory_is_found(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    fill = Guest.fill

    def fill_wrongly(guest: Guest) -> None:
        fill(guest)
        with open(guest.sent[0], "r+b", closefd=False) as file:
            file.seek(1234 * 4096 + 100)
            file.write(b"wrong")

    monkeypatch.setattr(Guest, "fill", fill_wrongly)
    with pytest.raises(DataError, match="wrong memory: region 0: page 1234: word 12 is 0x"):
        replay(load([made("sequential")]), Setup(speed=None))


def test_daemon_that_refuses_its_settings(made: Callable[..., Path], command: Command) -> None:
    ended = command("run", made("random"), "--set", "paging.pol_us=0")
    assert ended.returncode == ConfigError.exit_code
    assert "daemon ended with 78" in ended.stderr
    assert "the nearest is poll_us in [paging]" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["--set=paging.poll_us=1979-05-27"], ConfigError, 'poll_us = "1979-05-27": must be a whole number'),
        (["--source=--lanes=99"], UsageError, "source ended with 64: gmemd-source: --lanes 99: 1 to 15"),
        (["--source=--help"], UnavailableError, "source says what is no event: usage: gmemd-source"),
        (["--speed=0"], UsageError, "argument --speed: 0: from 0.001 to 1000000.0; see gmemd-replay run --help"),
    ],
)
def test_replay_asked_wrongly(
    made: Callable[..., Path], command: Command, arguments: list[str], code: type[GmemdError], error: str
) -> None:
    ended = command("run", made("random", pages=64, faults=10), *arguments)
    assert (ended.returncode, ended.stdout) == (code.exit_code, "")
    assert error in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("victim", ["daemon", "source"])
def test_process_that_dies_ends_the_replay(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    """Also the threads that wait for a page then."""
    start = Stage.start

    async def start_and_note(stage: Stage, name: str, *arguments: Any, **more: Any) -> Process:
        process = await start(stage, name, *arguments, **more)
        started[name] = process
        return process

    def ready(guest: Guest) -> None:
        started[victim].process.kill()
        become_ready(guest)

    started: dict[str, Process] = {}
    become_ready = Guest.ready
    monkeypatch.setattr(Stage, "start", start_and_note)
    monkeypatch.setattr(Guest, "ready", ready)
    with pytest.raises(UnavailableError, match=f"{victim} was ended by SIGKILL"):
        replay(load([made("random")]), Setup(speed=None, on_demand=True))


def test_guest_that_has_no_room_here(made: Callable[..., Path]) -> None:
    huge = Recording(load([made("random")]).header)
    huge.header = type(huge.header)("m", 1, 1, (region(1 << 40),))
    with pytest.raises(UnavailableError, match=f"the trace's guest has {1 << 52} bytes"):
        replay(huge, Setup())


# Between the two ends.


def test_replay_over_a_bad_network(made: Callable[..., Path]) -> None:
    """Every page is right whatever happens to either end and between them."""
    trace = load([made("sequential", pages=2048, threads=2, faults=2000)])
    network = parse("latency=1ms,cut@300K,daemon-kill@1M,source-kill@2M,corrupt@3M")
    told = replay(trace, Setup(speed=None, on_demand=True, network=network))
    assert told["pages_verified"] == 2048
    assert told["daemon"]["recoveries"] >= 2


def test_replay_over_the_kernels_network(made: Callable[..., Path]) -> None:
    setup = Setup(speed=None, network=parse("rate=100M,by=kernel"))
    try:
        told = replay(load([made("random", pages=4096)]), setup)
    except UnavailableError as error:
        if not str(error).startswith("--network by=kernel: "):
            raise
        pytest.skip(str(error))
    assert told["pages_verified"] == 4096


def test_compare(made: Callable[..., Path], command: Command, tmp_path: Path) -> None:
    trace = made("random", pages=2048, faults=500)
    ways = ("--flat-out", "--rounds", 1, "--on-demand", "--against-set", "paging.poll_us=0")
    ended = command("compare", trace, *ways, "-o", tmp_path / "runs", "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    told = json.loads(ended.stdout)
    assert [len(told[name]) for name in ("a", "b")] == [1, 1]
    # Where nothing comes unasked, the accesses alone decide what is waited for.
    assert told["figures"]["faults"]["change"] == pytest.approx(0, abs=0.05)
    assert told["figures"]["duration_us"]["a"]["median"] == told["a"][0]["duration_us"]
    runs = [runfile.read(tmp_path / "runs" / f"{name}1.gmrun") for name in ("a", "b")]
    for run, name in zip(runs, ("a", "b"), strict=True):
        assert run.result == told[name][0]
        assert sum(touch.waited for touch in run.touches) == told[name][0]["faults"]
        assert run.regions == [(0, 2048, 4096)]
        assert sorted((touch.thread, touch.page) for touch in run.touches) == sorted(
            (thread, page) for _, page, thread, _, _ in load([trace])
        )


# A VMM that hands its memory to the recorder.


def listens(path: Path) -> bool:
    """A socket that others may connect to; it is there a little earlier."""
    listening = rf"^\S+ \S+ \S+ 00010000 .* {re.escape(str(path))}$"
    return re.search(listening, Path("/proc/net/unix").read_text(), re.MULTILINE) is not None


async def test_record(tmp_path: Path) -> None:
    """Every first touch, in its order; and in the end the VMM has all its memory."""
    pages = [9, 4, 1000, 5, 4, 9, 77]
    daemon = tmp_path / "gmemd.sock"
    with Guest([region(PAGES)], seed=3) as guest:
        guest.fill()
        memory = f"/proc/{os.getpid()}/fd/{guest.sent[0]}"
        words = ("record", "--socket", daemon, "--file", memory, "--migration", "m", "-o", tmp_path, "--seconds", "0.3")
        command = [sys.executable, "-m", "gmemd_tools.replay.cli", *map(str, words), "--json"]
        async with trio.open_nursery() as nursery:
            process = await nursery.start(partial(trio.run_process, command, capture_stdout=True, capture_stderr=True))
            with Receiver(guest, daemon, "m") as receiver:
                while not listens(daemon):
                    await trio.sleep(0.01)
                await receiver.hand_over()
                nursery.start_soon(receiver.listen)
                await receiver.ready.wait()
                guest.ready()
                records = b"".join(RECORD.pack(0, page, 7, 0, 0) for page in pages)
                played = await trio.to_thread.run_sync(guest.play, 7, bytearray(records), 0, 0.0)
                await receiver.done.wait()
            await process.wait()
        assert [bool(waited) for *_, waited in played.touches] == [True, True, True, True, False, False, True]
        assert guest.verify() == PAGES
    recording = load(list(segments(tmp_path / "m.gmtrace").values()))
    assert faulted_pages(recording)[played.tid] == [(0, page) for page in (9, 4, 1000, 5, 77)]
