"""Trace files: what is written is read again, and of a damaged one whatever is sound."""

import json
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gmemd import trace
from gmemd.errors import DataError
from gmemd.native import crc32c, lib
from gmemd.native.memory import Region
from gmemd.trace import RECORD, Fault, TraceReader, TraceWriter

START = 10**15
ExpectLog = Callable[[str], None]


def region(pages: int, page_size: int = 4096, gpa: int = 0) -> Region:
    return Region(offset=0, size=pages * page_size, page_size=page_size, gpa=gpa)


REGIONS = (region(300), region(1 << 40, gpa=1 << 32), region(7, 2 << 20))


def pack(faults: Sequence[Fault]) -> bytes:
    return b"".join(
        RECORD.pack(f.time_ns, f.page, f.thread, f.region, f.write * lib.GM_TRACE_WRITE | f.minor * lib.GM_TRACE_MINOR)
        for f in faults
    )


def some_faults(rng: random.Random, count: int, threads: int = 4) -> list[Fault]:
    faults = []
    now = START
    for _ in range(count):
        now += lib.GM_TRACE_TICK_NS * rng.randrange(2000)
        place = rng.randrange(len(REGIONS))
        page = rng.randrange(REGIONS[place].pages)
        faults.append(Fault(now, page, rng.randrange(threads), place, rng.random() < 0.5, rng.random() < 0.5))
    return faults


def write(path: Path, faults: Sequence[Fault], block: int = 1 << 30) -> Path:
    """A trace with `block` faults in each block, or as many as have room."""
    with TraceWriter(path, "m", REGIONS) as writer:
        for at in range(0, len(faults), block):
            writer.add(pack(faults[at : at + block]))
            writer.flush()
    return path


def read(path: Path) -> list[Fault]:
    with TraceReader(path) as reader:
        return list(reader)


def faults_in(index: int) -> st.SearchStrategy[Fault]:
    return st.builds(
        Fault,
        time_ns=st.integers(0, 1 << 62),
        page=st.integers(0, REGIONS[index].pages - 1),
        thread=st.integers(0, (1 << 32) - 1),
        region=st.just(index),
        write=st.booleans(),
        minor=st.booleans(),
    )


FAULTS = st.lists(st.integers(0, len(REGIONS) - 1).flatmap(faults_in))


@given(faults=FAULTS, cut=st.integers(1, 100))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip(tmp_path: Path, faults: list[Fault], cut: int) -> None:
    faults.sort(key=lambda fault: fault.time_ns)
    got = read(write(tmp_path / "t.gmtrace", faults, cut))
    assert [fault[1:] for fault in got] == [fault[1:] for fault in faults]
    late = [before.time_ns - after.time_ns for before, after in zip(faults, got, strict=True)]
    assert all(0 <= ns < lib.GM_TRACE_TICK_NS for ns in late)


def test_header(tmp_path: Path) -> None:
    with TraceReader(write(tmp_path / "t.gmtrace", [])) as reader:
        assert reader.header.migration == "m"
        assert reader.header.regions == REGIONS
        assert reader.header.realtime_ns > 1e18
        assert 0 < reader.header.monotonic_ns < reader.header.realtime_ns
        assert list(reader) == []


def test_earlier_time_counts_as_the_one_before(tmp_path: Path) -> None:
    times = [START, START - 5000, START + 100]
    got = read(write(tmp_path / "t.gmtrace", [Fault(time, 0, 1, 0, False, False) for time in times], 2))
    assert [fault.time_ns for fault in got] == [START, START, START + 100]


def test_more_threads_than_a_block_takes(tmp_path: Path) -> None:
    faults = [Fault(START, page, page, 0, False, False) for page in range(300)]
    assert read(write(tmp_path / "t.gmtrace", faults)) == faults


def test_lost_faults_are_counted(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t.gmtrace", "m", REGIONS) as writer:
        writer.add(b"", 3)
        writer.add(pack([Fault(START, 1, 1, 0, True, False)]), 4)
    with TraceReader(tmp_path / "t.gmtrace") as reader:
        assert len(list(reader)) == 1
        assert reader.lost == 7


@pytest.mark.parametrize(("page", "place"), [(300, 0), (0, 3), (7, 2)])
def test_writer_refuses_what_is_outside_of_the_regions(tmp_path: Path, page: int, place: int) -> None:
    writer = TraceWriter(tmp_path / "t.gmtrace", "m", REGIONS)
    writer.add(pack([Fault(START, page, 1, place, False, False)]))
    with pytest.raises(ValueError, match=f"region {place}: no page {page}"):
        writer.close()


@pytest.mark.parametrize("threads", [1, 16])
def test_a_million_faults_take_8_mb(tmp_path: Path, rng: random.Random, threads: int) -> None:
    """All over 512 GiB, at the pace that one userfaultfd has been seen to keep up."""
    million, pages = 10**6, 1 << 27
    records, now = [], START
    for _ in range(million):
        now += rng.randrange(60_000)
        records.append(RECORD.pack(now, rng.randrange(pages), rng.randrange(threads), 0, rng.randrange(4)))
    path = tmp_path / "t.gmtrace"
    with TraceWriter(path, "m", [region(pages)]) as writer:
        writer.add(b"".join(records))
    assert path.stat().st_size <= 8_000_000
    with TraceReader(path) as reader:
        assert sum(len(block) for block in reader.blocks()) == million * RECORD.size


# Damage.


def block_starts(data: bytes) -> list[int]:
    return [at for at in range(len(data)) if data.startswith(trace.MARK, at)]


def test_damage_anywhere_gives_nothing_wrong(tmp_path: Path, rng: random.Random, expect_log: ExpectLog) -> None:
    expect_log("WARNING gmemd.trace: .* damaged or cut off: passed over")
    block, blocks = 5, 6
    faults = some_faults(rng, block * blocks)
    path = write(tmp_path / "t.gmtrace", faults, block)
    good = path.read_bytes()
    starts = block_starts(good)
    for at in range(len(good)):
        for flip in (1 << rng.randrange(8), 0xFF):
            damaged = bytearray(good)
            damaged[at] ^= flip
            path.write_bytes(damaged)
            if at < starts[0]:
                with pytest.raises(DataError):
                    read(path)
            else:
                hit = sum(start <= at for start in starts) - 1
                assert read(path) == faults[: hit * block] + faults[(hit + 1) * block :]


def test_cut_off_anywhere_gives_the_blocks_before(tmp_path: Path, rng: random.Random, expect_log: ExpectLog) -> None:
    expect_log("WARNING gmemd.trace: .* damaged or cut off: passed over")
    block, blocks = 5, 4
    faults = some_faults(rng, block * blocks)
    path = write(tmp_path / "t.gmtrace", faults, block)
    good = path.read_bytes()
    starts = block_starts(good)
    for length in range(len(good)):
        path.write_bytes(good[:length])
        if length < starts[0]:
            with pytest.raises(DataError):
                read(path)
        else:
            whole = sum(end <= length for end in starts[1:])
            assert read(path) == faults[: block * whole]


def test_a_large_hole_is_passed_over(tmp_path: Path, rng: random.Random, expect_log: ExpectLog) -> None:
    faults = some_faults(rng, 20_000)
    path = write(tmp_path / "t.gmtrace", faults)
    data = bytearray(path.read_bytes())
    data[10_000 : len(data) // 2] = bytes(len(data) // 2 - 10_000)
    path.write_bytes(data)
    expect_log("WARNING gmemd.trace: .* damaged or cut off: passed over")
    with TraceReader(path) as reader:
        got = list(reader)
        assert reader.damaged >= len(data) // 2 - 10_000
    assert set(got) <= set(faults)
    assert got[-1] == faults[-1]
    assert len(faults) // 3 < len(got) < len(faults)


@pytest.mark.parametrize("inside", range(len(trace.MARK) + 1))
def test_a_mark_across_two_reads_is_found(tmp_path: Path, expect_log: ExpectLog, inside: int) -> None:
    path = write(tmp_path / "t.gmtrace", [])
    path.write_bytes(path.read_bytes() + bytes(trace.READ_BYTES - inside) + block(GOOD))
    expect_log(f"{trace.READ_BYTES - inside} bytes from .* damaged or cut off")
    assert len(read(path)) == 1


@given(rest=st.binary(max_size=200), marks=st.integers(0, 3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_without_a_crash(tmp_path: Path, expect_log: ExpectLog, rest: bytes, marks: int) -> None:
    expect_log("WARNING gmemd.trace: .* damaged or cut off: passed over")
    path = write(tmp_path / "t.gmtrace", [])
    path.write_bytes(path.read_bytes() + (trace.MARK * marks).join([rest, rest]))
    with TraceReader(path) as reader:
        assert list(reader) == []
        assert reader.damaged == len(path.read_bytes()) - len(trace.encode_header(reader.header))


def test_a_crash_loses_what_is_younger_than_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "MAX_AGE", 0.0)
    fault = Fault(START, 1, 1, 0, False, False)
    writer = TraceWriter(tmp_path / "t.gmtrace", "m", REGIONS)
    writer.add(pack([fault]))
    assert read(tmp_path / "t.gmtrace") == [fault]
    monkeypatch.undo()
    writer.add(pack([fault]))
    assert read(tmp_path / "t.gmtrace") == [fault]
    writer.close()
    assert read(tmp_path / "t.gmtrace") == [fault, fault]


# Sound blocks with unsound content: made by something else than our writer.


def numbers(*values: int) -> bytes:
    """As LEB128."""
    out = bytearray()
    for value in values:
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
    return bytes(out)


def block(code: bytes, tick: int = 0) -> bytes:
    body = trace.COUNTS.pack(len(code), 0, tick) + code
    return trace.MARK + trace.CRC.pack(crc32c(body)) + body


GOOD = numbers(0, 9, 1, 2)  # thread 9, a tick later, page 1
OTHER_REGION = 4


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (numbers(0, 5, 598), "page 300 outside region 0"),
        (numbers(0, 5, 5), "page 18446744073709551614 outside region 0"),
        (numbers(OTHER_REGION, 3, 5, 0), "region 3 of 3"),
        (numbers(2 << 3, 5, 0), "not a record"),  # the third thread, after the first
        (numbers(1 << 3, 1 << 32, 5, 0), "not a record"),
        (numbers(0, 1 << 63, 0), "a time that cannot be"),
        (b"\x00\x05", "not a record"),
        (b"\x00" + b"\xff" * 11, "not a record"),
        (b"\x00\x05" + b"\xff" * 9 + b"\x02", "not a record"),  # more than 64 bits
    ],
)
def test_unsound_records(tmp_path: Path, expect_log: ExpectLog, code: bytes, said: str) -> None:
    path = write(tmp_path / "t.gmtrace", [])
    path.write_bytes(path.read_bytes() + block(GOOD + code) + block(GOOD, tick=1000))
    expect_log(f"WARNING gmemd.trace: .* {said}.*: only its first 1 faults are used")
    first, second = read(path)
    assert first == Fault(100, 1, 9, 0, False, False)
    assert (second.page, second.thread) == (1, 9)


def test_times_that_go_backwards(tmp_path: Path, expect_log: ExpectLog) -> None:
    path = write(tmp_path / "t.gmtrace", [])
    path.write_bytes(path.read_bytes() + block(GOOD, 5000) + block(GOOD, 4000))
    expect_log("WARNING gmemd.trace: .* begins 100 µs before the last one's end")
    assert [fault.time_ns for fault in read(path)] == [500_100, 500_200]


def test_a_block_that_is_too_long_is_none(tmp_path: Path, expect_log: ExpectLog) -> None:
    path = write(tmp_path / "t.gmtrace", [])
    code = GOOD + bytes(lib.GM_TRACE_CODE_BYTES)
    path.write_bytes(path.read_bytes() + block(code) + block(GOOD))
    expect_log(f"{len(block(code))} bytes from .* damaged or cut off")
    assert len(read(path)) == 1


# Headers.


def header(version: int = trace.VERSION, text: bytes | None = None, **values: object) -> bytes:
    good = {"migration": "m", "realtime_ns": 1, "monotonic_ns": 1, "regions": [[0, 1, 4096]]}
    text = json.dumps(good | values).encode() if text is None else text
    head = trace.HEAD.pack(trace.MAGIC, version, len(text))
    return head + trace.CRC.pack(crc32c(head + text)) + text


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not a trace: it begins with b''"),
        (b"\x7fELF" + bytes(60), "not a trace: it begins with b'.x7fELF"),
        (header(version=2), r"version 2 of the trace format \(this gmemd reads 1\)"),
        (header(text=b" " * (trace.MAX_HEADER + 1)), "header is damaged: 131073 bytes"),
        (header(text=b"[" * 100_000), "header makes no sense: RecursionError"),
        (header(text=b"\xff"), "header makes no sense: UnicodeDecodeError"),
        (header(text=b"[]"), "header makes no sense: TypeError"),
        (header(text=b"{}"), "header makes no sense: KeyError"),
        (header(migration="../m"), "header makes no sense: '../m'"),
        (header(regions=[]), "header makes no sense: 'm', 0 regions"),
        (header(regions=[[0, 1, 4096]] * 1025), "header makes no sense: 'm', 1025 regions"),
        (header(regions=[[0, 1, 1000]]), "1 pages of 1000 bytes"),
        (header(regions=[[0, 0, 4096]]), "0 pages of 4096 bytes"),
        (header(regions=[[0, 1 << 51, 4096]]), f"{1 << 51} pages of 4096 bytes"),
        (header(regions=[[0, 1, 4096, 0]]), "header makes no sense: ValueError"),
        (header(regions=[[-1, 1, 4096]]), "-1: not a whole number"),
        (header(monotonic_ns=float("inf")), "inf: not a whole number"),
    ],
)
def test_bad_header(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "t.gmtrace"
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"{path}: .*{said}"):
        TraceReader(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.gmtrace: No such file"):
        TraceReader(tmp_path / "none.gmtrace")


def test_must_fit(tmp_path: Path) -> None:
    with TraceReader(write(tmp_path / "t.gmtrace", [])) as reader:
        reader.must_fit(REGIONS)
        with pytest.raises(DataError, match="region 1: gpa 4294967296 in the trace, 4096 in the guest"):
            reader.must_fit([REGIONS[0], region(1 << 40, gpa=4096), REGIONS[2]])
        with pytest.raises(DataError, match="region 0: pages 300 in the trace, 301 in the guest"):
            reader.must_fit([region(301)])
        with pytest.raises(DataError, match="3 regions in the trace, 2 in the guest"):
            reader.must_fit(REGIONS[:2])


# Rotation.


def test_rotation_keeps_within_its_bound(tmp_path: Path, rng: random.Random) -> None:
    bound = 200_000
    faults = some_faults(rng, 100_000)
    path = tmp_path / "m.gmtrace"
    others = [tmp_path / name for name in ("m.1.0.gmtrace", "m.gmtrace", "n.0.gmtrace", "m.0.gmtrace.old")]
    for other in others:
        other.write_bytes(b"another's")
    with TraceWriter(path, "m", REGIONS, bound) as writer:
        for at in range(0, len(faults), 1000):
            writer.add(pack(faults[at : at + 1000]))
            assert sum(file.stat().st_size for file in trace.segments(path).values()) <= bound
    row = trace.segments(path)
    assert list(row) == list(range(min(row), min(row) + len(row)))
    assert min(row) > 0, "nothing had to go"
    got = [fault for file in row.values() for fault in read(file)]
    assert got == faults[-len(got) :]
    assert sum(file.stat().st_size for file in row.values()) > bound * 5 // 8
    assert all(other.read_bytes() == b"another's" for other in others)


def test_rotation_goes_on_with_an_earlier_row(tmp_path: Path, rng: random.Random) -> None:
    first, second = some_faults(rng, 100), some_faults(rng, 100)
    for faults in (first, second):
        with TraceWriter(tmp_path / "m.gmtrace", "m", REGIONS, 1 << 20) as writer:
            writer.add(pack(faults))
    assert [read(file) for file in trace.segments(tmp_path / "m.gmtrace").values()] == [first, second]


def test_rotation_with_less_room_than_it_needs_keeps_four_blocks(tmp_path: Path, rng: random.Random) -> None:
    faults = some_faults(rng, 20_000)
    with TraceWriter(tmp_path / "m.gmtrace", "m", REGIONS, 1) as writer:
        writer.add(pack(faults))
    row = trace.segments(tmp_path / "m.gmtrace").values()
    assert len(row) == trace.SEGMENTS
    assert all(old.time_ns <= new.time_ns for file in row for old, new in pairwise(read(file)))
    assert read(list(row)[-1])[-1] == faults[-1]
