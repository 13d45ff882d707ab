"""races.c, compiled for the tests that need it."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cffi import FFI
from native_inside import function
from native_rig import Task

CODE = Path(__file__).with_name("races.c")
ffi = FFI()
ffi.cdef("""
struct race {
    void *source, *next, *set, *claim;
    uint64_t *claimed;
    uint64_t pages, step[2], got;
};
uint64_t claim_together(struct race *);
int take_middle(struct race *, uint8_t *sent);
""")


class Races:
    def __init__(self, library: Path) -> None:
        self._library: Any = ffi.dlopen(str(library))

    def _race(self, claimed: Any, pages: int) -> Any:
        race: Any = ffi.new("struct race *")
        for field, name in (("next", "gm_source_next"), ("set", "gm_bitmap_set"), ("claim", "gm_bitmap_claim")):
            setattr(race, field, ffi.cast("void *", function(name)))
        race.claimed, race.pages = ffi.cast("uint64_t *", claimed), pages
        return race

    def claim_together(self, claimed: Any, pages: int) -> int:
        """Two threads claim all pages of an empty bitmap; returns how many both got together."""
        # In a thread of its own, as it ties itself to a CPU.
        return int(Task(self._library.claim_together, self._race(claimed, pages)).result())

    def take_middle(self, claimed: Any, pages: int, source: int) -> bytes:
        """A source's background against an urgent lane that takes the middle page of three; how often it took each."""
        race, sent = self._race(claimed, pages), ffi.new("uint8_t[]", pages)
        race.source = ffi.cast("void *", source)
        assert Task(self._library.take_middle, race, sent).result() == 0
        return bytes(ffi.buffer(sent))


@pytest.fixture
def races(require_command: Callable[[str], str], tmp_path: Path) -> Races:
    library = tmp_path / "races.so"
    compiler = require_command("cc")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-pthread", CODE, "-o", library], check=True)
    return Races(library)
