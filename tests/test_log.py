"""How log records look, and how often they come."""

import errno
import io
import logging
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gmemd.journal import Journal, fields
from gmemd.log import BURST, BURST_SECONDS, MAX_KEYS, Limit, Text, is_journal, set_up


def record(level: int, message: str, **extra: object) -> logging.LogRecord:
    base = {"levelno": level, "levelname": logging.getLevelName(level), "msg": message}
    return logging.makeLogRecord(base | extra)


def test_text_names_the_subject_first() -> None:
    text = Text(journal=False)
    assert text.format(record(logging.INFO, "done", lane="urgent", migration="m1")) == (
        "gmemd: migration m1: lane urgent: done"
    )
    assert text.format(record(logging.WARNING, "late")) == "gmemd: warning: late"


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.DEBUG, 7), (logging.INFO, 6), (logging.WARNING, 4), (logging.ERROR, 3), (logging.CRITICAL, 2)],
)
def test_journal_knows_the_priority_of_every_line(level: int, priority: int) -> None:
    text = Text(journal=True).format(record(level, "one\ntwo", lane=3))
    assert text == f"<{priority}>lane 3: one\n<{priority}>two"


def test_traceback_is_kept() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        text = Text(journal=True).format(record(logging.ERROR, "what", exc_info=sys.exc_info()))
    assert text.splitlines()[0] == "<3>what"
    assert text.splitlines()[-1] == "<3>ValueError: why"


def test_once() -> None:
    once = Limit(clock=iter([0.0, 0.0, 0.0, 1e9]).__next__)
    assert once.filter(record(logging.INFO, "first", once="a"))
    assert once.filter(record(logging.INFO, "another", once="b"))
    assert once.filter(record(logging.INFO, "always"))
    assert not once.filter(record(logging.INFO, "second", once="a"))


def test_every() -> None:
    times = range(0, 130, 10)
    once = Limit(clock=iter(times).__next__)
    passed = [now for now in times if once.filter(record(logging.INFO, "again", once="a", every=60.0))]
    assert passed == [0, 60, 120]


def test_what_was_held_back_is_told() -> None:
    limit = Limit(clock=iter([0.0, 1.0, 2.0, 60.0]).__next__)
    told = [record(logging.INFO, "again", once="a", every=60.0) for _ in range(4)]
    assert [limit.filter(one) for one in told] == [True, False, False, True]
    assert Text(journal=False).format(told[3]) == "gmemd: again (and 2 more like it since)"


def test_a_peer_cannot_flood_the_log() -> None:
    limit = Limit(clock=iter([0.0] * (3 * BURST) + [BURST_SECONDS] * 3).__next__)
    told = [record(logging.WARNING, f"refused {n}", pathname="x.py", lineno=7) for n in range(2 * BURST)]
    assert [limit.filter(one) for one in told] == [True] * BURST + [False] * BURST
    other = [record(logging.WARNING, "other", pathname="x.py", lineno=8) for _ in range(BURST)]
    assert all(limit.filter(one) for one in other)
    later = record(logging.WARNING, "refused again", pathname="x.py", lineno=7)
    assert limit.filter(later)
    assert Text(journal=False).format(later) == f"gmemd: warning: refused again (and {BURST} more like it since)"


def test_keys_are_forgotten_in_the_end() -> None:
    once = Limit(clock=lambda: 0.0)
    for key in range(3 * MAX_KEYS):
        once.filter(record(logging.INFO, "one of many", once=key))
    assert list(once.passed) == list(range(2 * MAX_KEYS, 3 * MAX_KEYS))


def test_is_journal(tmp_path: Path) -> None:
    with (tmp_path / "stream").open("w") as stream:
        status = os.fstat(stream.fileno())
        assert is_journal(stream, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
        assert not is_journal(stream, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + 1}"})
        assert not is_journal(stream, {})
    assert not is_journal(io.StringIO(), {"JOURNAL_STREAM": "1:1"})


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "journal"))
        channel.settimeout(10)
        yield channel


def read_fields(data: bytes) -> dict[str, str]:
    """As journald does."""
    found = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, has_value, value = line.partition(b"=")
        if not has_value:
            (length,) = struct.unpack_from("<Q", data)
            value, data = data[8 : 8 + length], data[8 + length + 1 :]
        found[name.decode()] = value.decode()
    return found


def test_fields_for_the_journal() -> None:
    about = {"migration": "m", "lane": "urgent", "pathname": "/x.py", "lineno": 3, "funcName": "f"}
    error = OSError(errno.ENOSPC, "full")
    assert read_fields(fields(record(logging.ERROR, "not\nput: %s", args=(error,), **about))) == {
        "MESSAGE": "migration m: lane urgent: not\nput: [Errno 28] full",
        "PRIORITY": "3",
        "SYSLOG_IDENTIFIER": "gmemd",
        "CODE_FILE": "/x.py",
        "CODE_LINE": "3",
        "CODE_FUNC": "f",
        "GMEMD_MIGRATION": "m",
        "GMEMD_LANE": "urgent",
        "ERRNO": str(errno.ENOSPC),
    }


def test_journal_takes_what_fits_and_what_does_not(journald: socket.socket, tmp_path: Path) -> None:
    journal = Journal(logging.NullHandler(), tmp_path / "journal")
    journal.handle(record(logging.INFO, "short"))
    assert read_fields(journald.recv(4096))["MESSAGE"] == "short"
    long = "x\n" * (1 << 19)
    journal.handle(record(logging.INFO, long))
    data, (fd,), _, _ = socket.recv_fds(journald, 4096, 1)
    assert data == b""
    assert read_fields(os.pread(fd, 1 << 21, 0))["MESSAGE"] == long
    with pytest.raises(PermissionError):
        os.write(fd, b"x")
    os.close(fd)


def test_without_a_journal_it_goes_elsewhere(tmp_path: Path) -> None:
    stream = io.StringIO()
    otherwise = logging.StreamHandler(stream)
    otherwise.setFormatter(Text(journal=True))
    Journal(otherwise, tmp_path / "nowhere").handle(record(logging.WARNING, "all the same"))
    assert stream.getvalue() == "<4>all the same\n"


def test_which_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[logging.Handler] = []
    monkeypatch.setattr(logging, "basicConfig", lambda *, handlers, **_: chosen.extend(handlers))
    with (tmp_path / "stream").open("w") as stream:
        set_up(stream=stream)
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        set_up(stream=stream)
    assert [isinstance(handler, Journal) for handler in chosen] == [False, True]
