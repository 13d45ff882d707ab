"""Log records with their fields to the journal, in its native protocol.

One datagram a record: `FIELD=value` on a line, or the field's name, its length and its value where that holds line
ends. What does not fit into a datagram goes as a sealed memfd, with an empty one.
"""

import errno
import fcntl
import logging
import os
import socket
import struct
from pathlib import Path

from gmemd.log import PRIORITIES, SUBJECTS, what

SOCKET = Path("/run/systemd/journal/socket")
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
TOO_LARGE = (errno.EMSGSIZE, errno.ENOBUFS)
# Logging happens on the event loop, which must not wait long for a journal that is behind.
SEND_TIMEOUT = 0.2


class Journal(logging.Handler):
    """Sends to the journal; what it does not take goes to `otherwise`."""

    def __init__(self, otherwise: logging.Handler, path: Path = SOCKET) -> None:
        super().__init__()
        self.otherwise = otherwise
        self.path = str(path)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._send(fields(record))
        except OSError:
            self.otherwise.handle(record)

    def _send(self, data: bytes) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.settimeout(SEND_TIMEOUT)
            channel.connect(self.path)
            try:
                channel.send(data)
                return
            except OSError as error:
                if error.errno not in TOO_LARGE:
                    raise
            fd = os.memfd_create("gmemd-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.write(fd, data)
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
                socket.send_fds(channel, [b""], [fd])
            finally:
                os.close(fd)


def fields(record: logging.LogRecord) -> bytes:
    """A record as the journal takes it."""
    known = {
        "MESSAGE": what(record),
        "PRIORITY": str(PRIORITIES.get(record.levelno, 6)),
        "SYSLOG_IDENTIFIER": "gmemd",
        "CODE_FILE": record.pathname,
        "CODE_LINE": str(record.lineno),
        "CODE_FUNC": record.funcName or "",
    }
    known |= {f"GMEMD_{key.upper()}": str(getattr(record, key)) for key in SUBJECTS if hasattr(record, key)}
    if number := _errno(record):
        known["ERRNO"] = str(number)
    return b"".join(_field(name, value.encode(errors="backslashreplace")) for name, value in known.items())


def _field(name: str, value: bytes) -> bytes:
    if b"\n" not in value:
        return b"%s=%s\n" % (name.encode(), value)
    return b"%s\n%s%s\n" % (name.encode(), struct.pack("<Q", len(value)), value)


def _errno(record: logging.LogRecord) -> int | None:
    """Of the error that the record is about."""
    arguments = record.args if isinstance(record.args, tuple) else ()
    found = (getattr(argument, "errno", None) for argument in arguments if isinstance(argument, Exception))
    return next((number for number in found if isinstance(number, int)), None)
