"""The standard streams, made fit whatever a command was started with."""

import io
import os
import sys


def mend() -> None:
    """Fills closed ones with /dev/null: else the next file that is opened, a guest's memory even, takes the place, and is
    written to. Has letters that the locale lacks told by number: no command fails for a µ."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdin = sys.stdin or open(0, closefd=False)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
