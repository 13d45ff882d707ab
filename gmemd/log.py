"""How log records look: fields in the journal where stderr is the journal, else readable text.

A record says what it is about through `extra`, and how often it may be repeated:

    log.warning("no answer for %.1f s", age, extra={"migration": id, "lane": "urgent", "once": (id, "stall")})
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TextIO

SUBJECTS = ("migration", "lane")
# syslog(3): 3 is an error, 4 a warning, 6 information, 7 debugging.
PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
MAX_KEYS = 1024  # keys that are remembered, so that years of migrations leave nothing behind
# What a peer can bring about again and again, by what it sends, comes at most so often from one line of code.
BURST = 20
BURST_SECONDS = 10.0


def what(record: logging.LogRecord) -> str:
    """`migration X: lane urgent: no answer for 1.0 s`, and the traceback if there is one."""
    about = "".join(f"{key} {getattr(record, key)}: " for key in SUBJECTS if hasattr(record, key))
    held = getattr(record, "held", 0)
    return about + _plain.format(record) + (f" (and {held} more like it since)" if held else "")


_plain = logging.Formatter()


class Text(logging.Formatter):
    """For people, or for a journal that reads our stderr: then every line begins with its priority."""

    def __init__(self, journal: bool) -> None:
        super().__init__()
        self.journal = journal

    def format(self, record: logging.LogRecord) -> str:
        text = what(record)
        if self.journal:
            prefix = f"<{PRIORITIES.get(record.levelno, 6)}>"
            return "\n".join(prefix + line for line in text.splitlines())
        warning = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"gmemd: {warning}{text}"


@dataclass(slots=True)
class Passed:
    """How many passed since `since`, and how many like them were held back."""

    since: float
    count: int = 0
    held: int = 0


class Limit(logging.Filter):
    """Lets a record with `once` pass the first time, or once every `every` seconds if it has that, too; of others, so
    many from one line of code. The next that passes tells how many were held back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.clock = clock
        self.passed: dict[Hashable, Passed] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        key = getattr(record, "once", None)
        most, seconds = (1, getattr(record, "every", float("inf"))) if key is not None else (BURST, BURST_SECONDS)
        key = (record.pathname, record.lineno) if key is None else key
        now = self.clock()
        passed = self.passed.pop(key, None) or Passed(now)
        self.passed[key] = passed  # at the end, away from being forgotten
        if len(self.passed) > MAX_KEYS:
            del self.passed[next(iter(self.passed))]
        if now - passed.since >= seconds:
            record.held = passed.held
            passed.since, passed.count, passed.held = now, 0, 0
        if passed.count == most:
            passed.held += 1
            return False
        passed.count += 1
        return True


def is_journal(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether what we write there goes to the journal, which set JOURNAL_STREAM to its device and inode."""
    try:
        status = os.fstat(stream.fileno())
    except OSError:  # also io.UnsupportedOperation: not a file at all
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def set_up(level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Sends the records of the whole process from `level` up to the journal if `stream`, or stderr, is the journal,
    and else to that stream."""
    stream = stream or sys.stderr
    handler: logging.Handler = logging.StreamHandler(stream)
    handler.setFormatter(Text(is_journal(stream)))
    if is_journal(stream):
        from gmemd.journal import Journal

        handler = Journal(handler)
    handler.addFilter(Limit())
    logging.basicConfig(level=level, handlers=[handler], force=True)
