"""What is shipped: the sdist builds everything, the wheel holds what runs, units and documents are true."""

import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from gmemd import errors, mending
from gmemd.config import Config
from gmemd.errors import GmemdError
from gmemd.registry import FINISHED

ROOT = Path(__file__).parent.parent
# Not part of the sources: what was built here, and the repository itself.
NOT_SOURCES = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "*.so", "*.o",
    "_native.c", "gmemd-vmm", "bench.json", "bzImage",
)  # fmt: skip
MAX_EXPOSURE = 1.6  # of 10; what remains is the network, the devices of the probe and the user's own name
DESCRIPTORS_OF_A_MIGRATION = 64 + 4  # those of a hand-off; its state, its VMM's socket, the VMM's own state, digests
PYTHON_SECONDS = 20  # until a daemon knows that it cannot start, on a slow host


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources without anything that was built from them, so that nothing old gets into a package."""
    copy = tmp_path_factory.mktemp("package") / "gmemd"
    shutil.copytree(ROOT, copy, ignore=NOT_SOURCES, symlinks=True)
    return copy


@pytest.fixture(scope="module")
def packages(tree: Path) -> Path:
    """Where the sdist is, and the wheel that was built from that sdist."""
    output = tree.parent / "dist"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(tree)]
    run = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert run.returncode == 0, run.stdout[-2000:]
    return output


@pytest.fixture(scope="module")
def wheel(packages: Path) -> Path:
    (path,) = packages.glob("*.whl")
    return path


def test_sdist_holds_the_whole_tree(tree: Path, packages: Path) -> None:
    (path,) = packages.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        shipped = {name.partition("/")[2] for name in sdist.getnames()}
    sources = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    assert {"gmemd/native/uapi.h", "tools/vmm/main.c", "Makefile"} <= sources
    generated = {name for name in sources if ".egg-info/" in name}
    assert sources - generated - shipped == set()
    assert not [name for name in shipped if name.endswith((".o", ".so", "_native.c", "gmemd-vmm"))]


def test_wheel_fits_all_pythons_from_3_11(wheel: Path) -> None:
    assert re.fullmatch(r"gmemd-[0-9.]+-cp311-abi3-linux_\w+\.whl", wheel.name)


def test_wheel_holds_what_runs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        modes = {item.filename: item.external_attr >> 16 for item in archive.infolist()}
    assert {"gmemd/native/_native.abi3.so", "gmemd/native/_native.pyi", "gmemd/py.typed"} <= set(modes)
    assert modes["gmemd_tools/vmm/gmemd-vmm"] & 0o111 == 0o111
    assert not [name for name in modes if name.endswith((".c", ".h", ".o")) or name.startswith("tests/")]


def test_wheel_holds_what_lies_beside_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name.partition(".data/data/")[2] for name in archive.namelist()}
    units = {f"lib/systemd/system/{unit.name}" for unit in (ROOT / "systemd").glob("gmemd*.s*")}
    assert units | {"lib/sysusers.d/gmemd.conf", "lib/udev/rules.d/60-gmemd.rules"} <= names
    pages = ["man1/gmemd.1", "man1/gmemd-source.1", "man1/gmemd-replay.1", "man5/gmemd.toml.5", "man7/gmemd-protocol.7"]
    assert {f"share/man/{page}" for page in pages} <= names
    for command in ("gmemd", "gmemd-source", "gmemd-replay"):
        assert f"share/bash-completion/completions/{command}" in names
    assert {f"share/doc/gmemd/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= names


def test_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import gmemd.native._native as native; print(native.__file__)"
    environ = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environ, cwd=tmp_path, text=True, capture_output=True, check=True)
    assert Path(run.stdout.strip()) == tmp_path / "gmemd/native/_native.abi3.so"


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units with a program that exists in place of the daemon, which is not installed where they say."""
    for unit in (ROOT / "systemd").glob("gmemd*.s*"):
        (tmp_path / unit.name).write_text(unit.read_text().replace("/usr/bin/gmemd", "/bin/true"))
    return tmp_path


def test_systemd_finds_nothing_wrong(units: Path, require_command: Callable[[str], str]) -> None:
    command = [require_command("systemd-analyze"), "--man=no", "verify", *map(str, sorted(units.iterdir()))]
    environ = os.environ | {"SYSTEMD_UNIT_PATH": f"{units}:"}
    run = subprocess.run(command, env=environ, text=True, capture_output=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_exposure(units: Path, require_command: Callable[[str], str]) -> None:
    command = [require_command("systemd-analyze"), "security", "--offline=true", str(units / "gmemd.service")]
    report = subprocess.run(command, text=True, capture_output=True, check=True).stdout
    match = re.search(r"Overall exposure level for gmemd.service: ([0-9.]+)", report)
    assert match is not None
    assert float(match[1]) <= MAX_EXPOSURE, report


def test_user_is_made(tmp_path: Path, require_command: Callable[[str], str]) -> None:
    (tmp_path / "etc").mkdir()
    declaration = ROOT / "systemd/sysusers.d/gmemd.conf"
    subprocess.run([require_command("systemd-sysusers"), f"--root={tmp_path}", declaration], check=True)
    assert (tmp_path / "etc/passwd").read_text().startswith("gmemd:")
    assert re.search(r"^kvm:.*:gmemd$", (tmp_path / "etc/group").read_text(), re.MULTILINE)


def test_store_holds_every_migration() -> None:
    unit = (ROOT / "systemd/gmemd.service").read_text()
    limits = dict(re.findall(r"^(FileDescriptorStoreMax|LimitNOFILE)=(\d+)$", unit, re.MULTILINE))
    needed = Config().limits.migrations * DESCRIPTORS_OF_A_MIGRATION + FINISHED
    assert needed <= int(limits["FileDescriptorStoreMax"])
    assert needed + Config().network.max_connections <= int(limits["LimitNOFILE"])


def test_nothing_but_a_stop_or_a_wrong_configuration_ends_the_service() -> None:
    unit = (ROOT / "systemd/gmemd.service").read_text()
    assert re.findall("^(Restart|RestartPreventExitStatus|StartLimitIntervalSec)=(.*)$", unit, re.MULTILINE) == [
        ("StartLimitIntervalSec", "0"),
        ("Restart", "always"),
        ("RestartPreventExitStatus", str(errors.ConfigError.exit_code)),
    ]


def test_a_start_that_waits_until_it_is_mended_is_not_cut_short() -> None:
    unit = (ROOT / "systemd/gmemd.service").read_text()
    [seconds] = re.findall(r"^TimeoutStartSec=(\d+)$", unit, re.MULTILINE)
    assert int(seconds) >= mending.LONGEST + PYTHON_SECONDS


def test_socket_units_say_what_the_configuration_says() -> None:
    sockets = {unit.name: unit.read_text() for unit in (ROOT / "systemd").glob("*.socket")}
    assert f"={Config().daemon.socket}\n" in sockets["gmemd.socket"]
    assert f"={Config().daemon.status_socket}\n" in sockets["gmemd-status.socket"]


def test_exit_codes_are_documented() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", (ROOT / "docs/exit-codes.md").read_text(), re.MULTILINE)
    classes = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, GmemdError)]
    assert sorted(rows) == sorted((str(cls.exit_code), cls.__name__) for cls in classes if cls != GmemdError)
