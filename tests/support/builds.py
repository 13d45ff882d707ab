"""Other builds of the native helper, each in a folder of its own: put it first in PYTHONPATH."""

import os
import subprocess
import sys
from pathlib import Path

from support.pace import SLOWER

TREE = Path(__file__).parents[2]


def build(folder: Path, *flags: str) -> Path:
    """Builds the package with more compiler flags. Returns the folder in which it is found."""
    environ = os.environ | {"GMEMD_CFLAGS": " ".join(("-O1", *flags))}
    where = (f"--build-base={folder}", f"--build-lib={folder / 'lib'}")
    command = [sys.executable, "setup.py", "--quiet", "build", *where]
    subprocess.run(command, cwd=TREE, env=environ, check=True, capture_output=True, timeout=120 * SLOWER)
    return folder / "lib"
