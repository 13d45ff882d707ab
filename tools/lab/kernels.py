"""The kernels of the matrix: the one that runs, the lab's, and Debian's own, fetched by apt and not installed."""

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.lab.failure import LabError, Unavailable

HERE = Path(__file__).resolve().parent

META = "linux-image-amd64"
PARTS = re.compile(r"linux-(?:image|binary|modules)-\d[^ ,|]*")  # one package once, several since 7.2


@dataclass(frozen=True)
class Kernel:
    """`options`: what tools/lab/run needs to boot it; None for the kernel that runs."""

    name: str
    options: tuple[str, ...] | None


def apt_cache(config: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["apt-cache", *arguments], env=os.environ | {"APT_CONFIG": str(config)}, capture_output=True, text=True
    )
    return done.stdout


def packages(config: Path, name: str) -> Iterator[str]:
    """The packages that hold the kernel and its modules: what `name` depends on, and what those do."""
    for line in apt_cache(config, "show", "--no-all-versions", name).splitlines():
        if line.startswith("Depends:"):
            for part in PARTS.findall(line):
                yield part
                yield from packages(config, part)


def unpack(config: Path, names: list[str], folder: Path) -> None:
    """Downloads and unpacks into folder/root, unless the same packages are there already."""
    listed, root = folder / "packages", folder / "root"
    wanted = "\n".join(names) + "\n"
    if listed.exists() and listed.read_text() == wanted:
        return
    environment = os.environ | {"APT_CONFIG": str(config)}
    subprocess.run(["rm", "-rf", root], check=True)
    subprocess.run(["apt-get", "-qq", "download", *names], cwd=folder, env=environment, check=True)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, root], check=True)
        package.unlink()
    listed.write_text(wanted)


def debian(suite: str, folder: Path) -> Kernel:
    """The kernel that Debian's `suite` installs by default. `folder` keeps it."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([HERE / "need", "kmod"], check=True)
    subprocess.run([HERE / "apt-suites", folder / "apt", suite], check=True)
    config = folder / "apt/apt.conf"
    names = sorted(set(packages(config, META)))
    if not names:
        raise Unavailable(f"apt has no {META} in {suite}")
    unpack(config, names, folder)
    found = list((folder / "root").glob("**/lib/modules/*"))
    if len(found) != 1:
        raise LabError(f"{folder}/root: one folder of modules was expected, not {len(found)}")
    modules = found[0]
    images = [*(folder / "root").glob("boot/vmlinuz-*"), *modules.glob("vmlinuz")]
    if not (modules / "modules.dep").exists():
        base = modules.parents[2]
        subprocess.run(["depmod", "-b", base, modules.name], check=True, stderr=subprocess.DEVNULL)
    return Kernel(f"debian-{suite}", ("-k", str(images[0]), "-M", str(modules)))


NATIVE = Kernel("native", None)
LAB = Kernel("lab", ("-e", "GMEMD_LAB=1"))  # so that no test is skipped there for want of what it should have
