"""The lab's initramfs: busybox, `init`, what to run, and the modules that lead to the host's files."""

import os
import shlex
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from tools.lab.failure import LabError, Unavailable

HERE = Path(__file__).resolve().parent

# Without these there is no root file system, and so no other module.
EARLY_MODULES = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p")

Entry = tuple[str, int, bytes]  # path, mode, content


def cpio(entries: Iterable[Entry]) -> bytes:
    """An archive in the "newc" format, the one that the kernel unpacks."""
    archive = bytearray()
    for number, (name, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")]):
        path = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
        for part in (b"070701" + b"".join(b"%08x" % field for field in fields) + path, content):
            archive += part + bytes(-len(part) % 4)
    return bytes(archive)


def early_modules(modules: Path) -> Iterator[Path]:
    """The files of EARLY_MODULES and all that they depend on, relative to `modules`."""
    try:
        lines = (modules / "modules.dep").read_text().splitlines()
    except FileNotFoundError:
        raise LabError(f"{modules} has no modules.dep: run depmod on it") from None
    needs = dict(line.split(":", 1) for line in lines)
    for name in EARLY_MODULES:
        for file in needs:
            if Path(file).name.split(".")[0].replace("-", "_") == name:  # else it is built in
                yield from map(Path, (file, *needs[file].split()))


def with_parents(entries: Iterable[Entry]) -> Iterator[Entry]:
    made = {Path(".")}
    for name, mode, content in entries:
        for parent in reversed(Path(name).parents):
            if parent not in made:
                made.add(parent)
                yield str(parent), stat.S_IFDIR | 0o755, b""
        yield name, mode, content


def module_files(modules: Path) -> Iterator[Entry]:
    root = Path("lib/modules", modules.name)
    for file in dict.fromkeys([*early_modules(modules), Path("modules.dep")]):
        yield str(root / file), stat.S_IFREG | 0o644, (modules / file).read_bytes()


def busybox() -> bytes:
    path = shutil.which("busybox")
    if path is None:
        raise Unavailable("no busybox: apt-get install busybox-static")
    return Path(path).read_bytes()


def build(script: str, folders: str, modules: Path | None) -> bytes:
    """An archive whose `init` runs the shell script `script` once the calls in `folders` were made.

    `modules`, named for its kernel's release, is where a kernel finds what is not built into it.
    """
    program, text = stat.S_IFREG | 0o755, stat.S_IFREG | 0o644
    settings = f"modules={shlex.quote(os.fspath(modules)) if modules else ''}\n"
    entries: list[Entry] = [
        ("bin/busybox", program, busybox()),
        ("init", program, (HERE / "init").read_bytes()),
        ("command", text, script.encode()),
        ("lab.modules", text, settings.encode()),
        ("lab.folders", text, folders.encode()),
    ]
    return cpio(with_parents([*entries, *(module_files(modules) if modules else ())]))
