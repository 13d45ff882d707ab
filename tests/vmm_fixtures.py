"""What tests of the reference VMM are given: the program, a way to start it, the sockets around it."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest
from vmm_build import SOURCES, compile_vmm
from vmm_play import Sockets, Vmm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = SOURCES / "gmemd-vmm"
    newest = max(path.stat().st_mtime for path in SOURCES.glob("*.[ch]"))
    if built.exists() and built.stat().st_mtime >= newest:
        return built
    if not shutil.which("cc"):
        pytest.skip("no gmemd-vmm built, and no C compiler to build it with")
    return compile_vmm(tmp_path_factory.mktemp("vmm") / "gmemd-vmm")


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program with the address and undefined-behaviour sanitizers in it."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    return compile_vmm(tmp_path_factory.mktemp("vmm") / "sanitized", *flags)


@pytest.fixture(params=["kvm", "threads"])
def guest(request: pytest.FixtureRequest) -> str:
    if request.param == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm cannot be opened here")
    return str(request.param)


@pytest.fixture
def start(binary: Path) -> Iterator[Callable[..., Vmm]]:
    started: list[Vmm] = []

    def start(*arguments: object, program: Path = binary) -> Vmm:
        started.append(Vmm(program, *arguments))
        return started[-1]

    yield start
    for vmm in started:
        vmm.end()


@pytest.fixture
def sockets(tmp_path: Path) -> Iterator[Sockets]:
    sockets = Sockets(tmp_path)
    yield sockets
    sockets.close()
