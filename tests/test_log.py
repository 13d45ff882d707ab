"""How log records look, and how often they come."""

import io
import logging
import os
import sys
from pathlib import Path

import pytest

from gmemd.log import MAX_KEYS, Once, Text, is_journal


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
    text = Text(journal=True).format(record(level, "one\ntwo", region=3))
    assert text == f"<{priority}>region 3: one\n<{priority}>two"


def test_traceback_is_kept() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        text = Text(journal=True).format(record(logging.ERROR, "what", exc_info=sys.exc_info()))
    assert text.splitlines()[0] == "<3>what"
    assert text.splitlines()[-1] == "<3>ValueError: why"


def test_once() -> None:
    once = Once(clock=iter([0.0, 0.0, 1e9]).__next__)
    assert once.filter(record(logging.INFO, "first", once="a"))
    assert once.filter(record(logging.INFO, "another", once="b"))
    assert once.filter(record(logging.INFO, "always"))
    assert not once.filter(record(logging.INFO, "second", once="a"))


def test_every() -> None:
    times = range(0, 130, 10)
    once = Once(clock=iter(times).__next__)
    passed = [now for now in times if once.filter(record(logging.INFO, "again", once="a", every=60.0))]
    assert passed == [0, 60, 120]


def test_keys_are_forgotten_in_the_end() -> None:
    once = Once(clock=lambda: 0.0)
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
