"""Builds the targets that are C: each one program of its own C file and all of the native helper."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
TREE = HERE.parents[1]
SHARED = ("fuzz", "main")
TARGETS = sorted(path.stem for path in HERE.glob("*.c") if path.stem not in SHARED)
WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Wno-sign-conversion", "-Werror")
FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-pthread", f"-I{TREE}", *WARNINGS)
LIBRARIES = ("-lssl", "-lcrypto")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def helper() -> list[Path]:
    """The native helper, but for what only looks at the kernel."""
    files = sorted((TREE / "gmemd/native").glob("*.c"))
    return [path for path in files if not path.name.startswith(("_", "probe", "measure"))]


def build(folder: Path, compiler: Sequence[str], link: Sequence[str], shared: Sequence[str]) -> None:
    """All targets into `folder`. `compiler` is the command with the flags that all files need."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*helper(), *(HERE / f"{name}.c" for name in (*shared, *TARGETS))]
    commands = [[*compiler, *FLAGS, *SANITIZERS, "-c", str(path), "-o", str(_object(folder, path))] for path in sources]
    _run_all(commands)
    common = [str(_object(folder, path)) for path in sources if path.stem not in TARGETS or path.parent != HERE]
    for name in TARGETS:
        own = str(_object(folder, HERE / f"{name}.c"))
        command = [*compiler, *SANITIZERS, *link, "-pthread", own, *common, *LIBRARIES, "-o", str(folder / name)]
        subprocess.run(command, check=True, timeout=120)


def _object(folder: Path, path: Path) -> Path:
    return folder / f"{path.parent.name}-{path.stem}.o"


def _run_all(commands: Sequence[Sequence[str]]) -> None:
    """Two at a time."""
    for at in range(0, len(commands), 2):
        running = [subprocess.Popen(command) for command in commands[at : at + 2]]
        codes = [process.wait(120) for process in running]
        assert not any(codes), "a target cannot be compiled"
