"""races.c, compiled for the tests that need it."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cffi import FFI
from native_inside import address
from native_rig import Task

from gmemd.native import _native
from gmemd.native.destination import Destination
from gmemd.native.source import Source

CODE = Path(__file__).with_name("races.c")
ffi = FFI()
ffi.cdef("""
uint64_t race_claims(uint64_t *bits, uint64_t pages);
int race_source(void *source, uint8_t *sent);
int race_removal(void *destination, unsigned lane);
int race_marking(void *destination, unsigned lane);
int race_asking(void *destination, unsigned lane, const unsigned char *content);
""")


class Races:
    """Each runs in a thread of its own, as it ties itself to a CPU."""

    def __init__(self, library: Path) -> None:
        # What the races call is found in the library that is loaded already.
        ffi.dlopen(_native.__file__, os.RTLD_NOW | os.RTLD_GLOBAL)
        self._library: Any = ffi.dlopen(str(library))

    def claims(self, bits: Any, pages: int) -> int:
        """Two threads claim all pages of an empty bitmap; returns how many both got together."""
        return int(Task(self._library.race_claims, ffi.cast("uint64_t *", bits), pages).result())

    def source(self, source: Source) -> bytes:
        """The background against an urgent lane that takes the middle page of three; how often it took each."""
        sent = ffi.new("uint8_t[]", source.memory.pages)
        assert Task(self._library.race_source, ffi.cast("void *", address(source.native)), sent).result() == 0
        return bytes(ffi.buffer(sent))

    def removal(self, destination: Destination) -> int:
        """Each page is removed while a lane begins to install it; returns how many the lane did not hear of."""
        return int(Task(self._library.race_removal, ffi.cast("void *", address(destination.native)), 1).result())

    def marking(self, destination: Destination) -> int:
        """All pages come; returns how many of a vCPU's bits were cleared before their pages were received."""
        return int(Task(self._library.race_marking, ffi.cast("void *", address(destination.native)), 1).result())

    def asking(self, destination: Destination, content: bytes) -> int:
        """Page 0, for which a vCPU has asked, comes just when the request is read; returns how many wait then."""
        return int(
            Task(self._library.race_asking, ffi.cast("void *", address(destination.native)), 1, content).result()
        )


@pytest.fixture
def races(require_command: Callable[[str], str], tmp_path: Path) -> Races:
    library = tmp_path / "races.so"
    flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    top = Path(__file__).parents[2]
    subprocess.run([require_command("cc"), *flags, f"-I{top}", CODE, "-o", library], check=True)
    return Races(library)
