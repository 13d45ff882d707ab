"""What tests on guest_memfd share: whether this kernel has what they need, and a whole demo."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from gmemd import probe
from gmemd.errors import KernelError
from gmemd.native import check, lib
from support.pace import SLOWER

SECONDS = 30 * SLOWER  # for a demo; half a minute in an emulated machine on a host that does nothing else
TRYING = {
    "guest_memfd": probe.guest_memfd,
    "guest_memfd_userfault": probe.guest_memfd_userfault,
    "guest_memfd_no_direct_map": probe.guest_memfd_no_direct_map,
}


def need(backing: str) -> None:
    """Skips the test where the kernel cannot do that; in the lab it is said to be able to."""
    able = TRYING[backing]()
    if not able.ok and os.environ.get("GMEMD_LAB") == "1":
        pytest.fail(f"{backing}: {able.why}", pytrace=False)
    if not able.ok:
        pytest.skip(f"{backing}: {able.why}")


def need_files() -> None:
    """Skips the test where the kernel has no guest_memfd that could be mapped, so that nothing else is lacking."""
    try:
        os.close(check(lib.gm_memfile_guest_memfd, 4096, lib.GM_GUEST_MEMFD_MMAP | lib.GM_GUEST_MEMFD_INIT_SHARED))
    except KernelError as error:
        pytest.skip(str(error))


def run_demo(*arguments: str) -> tuple[int, dict[str, Any]]:
    """A demo on guest_memfd: its exit status, and the object that it prints."""
    command = [sys.executable, "-m", "gmemd.cli", "demo", "--json", "--backing=guest_memfd", "--memory=16M"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=SECONDS)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout or json.dumps({"error": done.stderr}))


def moved(*arguments: str) -> dict[str, Any]:
    """What a demo says in which everything went well."""
    status, said = run_demo(*arguments)
    assert status == 0, said
    assert said["ok"] is True
    assert said["guest"] == "kvm"
    assert said["trap"] == "missing+minor"
    assert said["mismatches"] == 0
    assert said["pages_verified"] == said["pages"] == (16 << 20) // 4096
    return said
