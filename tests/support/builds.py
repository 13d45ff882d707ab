"""Other builds of the native helper, each in a folder of its own: put it first in PYTHONPATH."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from support.pace import SLOWER

TREE = Path(__file__).parents[2]


def writable_tree(folder: Path) -> Path:
    """The checkout, or a copy of it where it may not be written: a build makes C code in it."""
    if os.access(TREE / "gmemd/native", os.W_OK):
        return TREE
    return Path(shutil.copytree(TREE, folder / "tree", ignore=shutil.ignore_patterns(".*", "build", "dist", "tests")))


def build(folder: Path, *flags: str) -> Path:
    """Builds the package with more compiler flags. Returns the folder in which it is found."""
    environ = os.environ | {"GMEMD_CFLAGS": " ".join(("-O1", *flags))}
    where = (f"--build-base={folder}", f"--build-lib={folder / 'lib'}")
    command = [sys.executable, "setup.py", "--quiet", "build", *where]
    tree, timeout = writable_tree(folder), 120 * SLOWER
    subprocess.run(command, cwd=tree, env=environ, check=True, capture_output=True, timeout=timeout)
    return folder / "lib"
