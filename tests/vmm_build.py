"""How the reference VMM is compiled."""

import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent.parent / "tools/vmm"
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-g", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-pthread"]


def compile_vmm(target: Path, *flags: str) -> Path:
    """The program, with more compiler flags."""
    sources = sorted(map(str, SOURCES.glob("*.c")))
    subprocess.run(["cc", *FLAGS, *flags, *sources, "-o", str(target)], check=True)
    return target
