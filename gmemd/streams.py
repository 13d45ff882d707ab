"""The standard streams, made fit whatever a command was started with."""

import io
import os
import sys

LAST = 2  # stderr


def mend() -> None:
    """Fills closed ones with /dev/null: else the next file that is opened, a guest's memory even, takes the place, and
    is written to. Has letters that the locale lacks told by number: no command fails for a µ."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= LAST:
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
