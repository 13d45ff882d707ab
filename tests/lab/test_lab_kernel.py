"""What gmemd counts on in the lab kernel: the checks of checks.c, each in a process of its own."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.pace import SLOWER

HERE = Path(__file__).parent
CHECKS = re.findall(r"^    CHECK\((\w+)\),$", (HERE / "checks.c").read_text(), re.MULTILINE)
WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Werror")
SKIP = 77  # as in checks.h
SECONDS = 60 * SLOWER  # for one check; 2 in the lab, where nothing else runs

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checks") / "checks"
    command = ["cc", "-std=c11", "-D_GNU_SOURCE", "-pthread", *WARNINGS]
    command += ["-iquote", str(HERE.parents[1] / "gmemd/native"), "-o", str(path)]
    subprocess.run([*command, *map(str, sorted(HERE.glob("*.c")))], check=True)
    return path


@pytest.mark.parametrize("check", CHECKS)
def test_check(check: str, program: Path, lacking: Callable[[str], None], request: pytest.FixtureRequest) -> None:
    done = subprocess.run([program, check], capture_output=True, text=True, timeout=SECONDS)
    if done.returncode == SKIP:
        lacking(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    request.node.user_properties += re.findall(r"(\w+) ([\d.]+)", done.stdout)
