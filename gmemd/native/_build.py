"""Builds gmemd.native._native from the C files beside this one.

What Python may call is declared once, in the headers: the lines between `/* python */` and `/* end python */`.
"""

import os
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent
# The order matters to cffi, which reads declarations one after another: types before their users.
HEADERS = [
    "problem.h",
    "secrecy.h",
    "uffd.h",
    "memfile.h",
    "stages.h",
    "memory.h",
    "digest.h",
    "frame.h",
    "crc32c.h",
    "histogram.h",
    "trace.h",
    "trace_code.h",
    "waits.h",
    "blocked.h",
    "tls.h",
    "destination.h",
    "lane.h",
    "pager.h",
    "order.h",
    "source.h",
    "push.h",
    "server.h",
    "player.h",
    "measure.h",
    "precedence.h",
    "probe.h",
]
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-g", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-pthread"]
# cffi writes one C file of its own, which these do not like.
PRAGMAS = "".join(
    f'#pragma GCC diagnostic ignored "-W{name}"\n' for name in ("conversion", "sign-conversion", "unused-parameter")
)


def declarations(header: Path) -> str:
    """The part of a header that Python sees."""
    text = header.read_text()
    parts = text.split("/* python */")[1:]
    return "".join(part.split("/* end python */")[0] for part in parts)


def sources() -> list[str]:
    """The C files, relative to the top of the tree, as setuptools wants them."""
    return [os.path.relpath(path) for path in sorted(HERE.glob("*.c")) if not path.name.startswith("_")]


ffibuilder = FFI()
ffibuilder.cdef("".join(declarations(HERE / name) for name in HEADERS))
ffibuilder.set_source(
    "gmemd.native._native",
    PRAGMAS + "".join(f'#include "gmemd/native/{name}"\n' for name in HEADERS),
    sources=sources(),
    include_dirs=[os.path.relpath(HERE.parents[1])],
    depends=[os.path.relpath(path) for path in sorted(HERE.glob("*.h"))],
    extra_compile_args=FLAGS + os.environ.get("GMEMD_CFLAGS", "").split(),
    libraries=["ssl", "crypto"],
    extra_link_args=["-pthread", *os.environ.get("GMEMD_LDFLAGS", "").split()],
)
