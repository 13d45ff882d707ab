"""How log records look: readable text on stderr, with priorities when that is the journal.

A record says what it is about through `extra`, and how often it may be repeated:

    log.warning("no answer for %.1f s", age, extra={"migration": id, "lane": "urgent", "once": (id, "stall")})
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TextIO

SUBJECTS = ("migration", "region", "lane", "peer")
# syslog(3): 3 is an error, 4 a warning, 6 information, 7 debugging.
PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
MAX_KEYS = 1024  # keys of `once` that are remembered, so that years of migrations leave nothing behind


class Text(logging.Formatter):
    """`migration X: lane urgent: no answer for 1.0 s`"""

    def __init__(self, journal: bool) -> None:
        super().__init__()
        self.journal = journal

    def format(self, record: logging.LogRecord) -> str:
        about = "".join(f"{key} {getattr(record, key)}: " for key in SUBJECTS if hasattr(record, key))
        text = about + super().format(record)
        if self.journal:
            prefix = f"<{PRIORITIES.get(record.levelno, 6)}>"
            return "\n".join(prefix + line for line in text.splitlines())
        warning = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"gmemd: {warning}{text}"


class Once(logging.Filter):
    """Lets a record with `once` pass the first time, or once every `every` seconds if it has that, too."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.clock = clock
        self.passed: dict[Hashable, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        key = getattr(record, "once", None)
        if key is None:
            return True
        now = self.clock()
        if key in self.passed and now - self.passed[key] < getattr(record, "every", float("inf")):
            return False
        self.passed.pop(key, None)  # so that it moves to the end, away from being forgotten
        self.passed[key] = now
        if len(self.passed) > MAX_KEYS:
            del self.passed[next(iter(self.passed))]
        return True


def is_journal(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether what we write there goes to the journal, which set JOURNAL_STREAM to its device and inode."""
    try:
        status = os.fstat(stream.fileno())
    except OSError:  # also io.UnsupportedOperation: not a file at all
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def set_up(level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Sends the records of the whole process from `level` up to `stream`, or stderr."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Text(is_journal(stream)))
    handler.addFilter(Once())
    logging.basicConfig(level=level, handlers=[handler], force=True)
