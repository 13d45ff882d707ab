"""Runs a command under the system call filter of a unit, as systemd would. usage: seccomp.py UNIT COMMAND…

For tests also: has one call fail.
"""

import ctypes
import errno
import os
import platform
import re
import struct
import subprocess
import sys
from pathlib import Path

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # a word of what is filtered; jump if equal; the verdict
NUMBER_AT, ARCHITECTURE_AT, FIRST_ARGUMENT_AT = 0, 4, 16
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def allowed(unit: Path) -> set[str]:
    """The calls that a unit's lines of SystemCallFilter= name."""
    return set(" ".join(re.findall(r"^SystemCallFilter=(.*)$", unit.read_text(), re.MULTILINE)).split())


def numbers() -> dict[str, int]:
    """Of this architecture."""
    text = "#include <asm/unistd.h>\n"
    macros = subprocess.run(["gcc", "-E", "-dM", "-"], input=text, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"^#define __NR_(\w+) (\d+)$", macros, re.MULTILINE)}


def program(names: set[str]) -> list[tuple[int, int, int, int]]:
    known = numbers()
    code = [
        (LOAD, 0, 0, ARCHITECTURE_AT),
        (EQUAL, 1, 0, ARCHITECTURES[platform.machine()]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER_AT),
    ]
    for name in sorted(names & known.keys()):
        code += [(EQUAL, 0, 1, known[name]), (RETURN, 0, 0, ALLOW)]
    code.append((RETURN, 0, 0, ERRNO | errno.EPERM))
    return code


def deny(name: str, fd: int, error: int) -> None:
    """From now on this thread's calls of that name fail with `error` on that descriptor."""
    code = [(LOAD, 0, 0, NUMBER_AT), (EQUAL, 0, 3, numbers()[name])]
    code += [(LOAD, 0, 0, FIRST_ARGUMENT_AT), (EQUAL, 0, 1, fd), (RETURN, 0, 0, ERRNO | error), (RETURN, 0, 0, ALLOW)]
    install(code)


def install(lines: list[tuple[int, int, int, int]]) -> None:
    """For this thread, and what becomes of it."""
    code = b"".join(struct.pack("HBBI", *line) for line in lines)
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    for call in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0)):
        if libc.prctl(*call):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    install(program(allowed(Path(sys.argv[1]))))
    os.execvp(sys.argv[2], sys.argv[2:])
