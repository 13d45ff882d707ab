"""The checks that conftest.py makes after each test, each seen to fail."""

import os
import re
import subprocess
import sys
from pathlib import Path

BAD_TESTS = """
import logging, os, threading
import pytest, trio

release = threading.Event()

def test_warns():
    logging.getLogger("here").warning("unannounced")

def test_does_not_warn(expect_log):
    expect_log("WARNING here: announced")

def test_leaves_descriptor():
    os.open("/dev/null", os.O_RDONLY)

def test_leaves_thread():
    threading.Thread(target=release.wait, name="left").start()

def test_leaves_file_to_the_collector():
    class Circle: pass
    circle = Circle()
    circle.itself, circle.file = circle, open("/dev/null")

@pytest.mark.deadline(0.01)
async def test_hangs():
    await trio.sleep_forever()

def test_good(expect_log, seed, rng):
    release.set()
    expect_log("WARNING here: announced")
    logging.getLogger("here").warning("announced")

@pytest.mark.leaks("on purpose")
def test_leaves_descriptor_on_purpose():
    os.open("/dev/null", os.O_RDONLY)

async def test_good_async():
    await trio.to_thread.run_sync(lambda: None)
"""


def test_bad_tests_fail(tmp_path: Path) -> None:
    here = Path(__file__).parent
    (tmp_path / "conftest.py").write_text((here / "conftest.py").read_text())
    (tmp_path / "pyproject.toml").write_text((here.parent / "pyproject.toml").read_text())
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_errors.py").write_text(BAD_TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "--layer", "base"]
    environ = os.environ | {"COLUMNS": "300", "PYTHONPATH": str(here)}
    run = subprocess.run(command, cwd=tmp_path, env=environ, text=True, capture_output=True, timeout=60)
    report = run.stdout
    results = dict(re.findall(r"^(?:FAILED|ERROR) tests/test_errors.py::(\w+) - (.*)$", report, re.MULTILINE))
    assert set(results) == {
        "test_warns",
        "test_does_not_warn",
        "test_leaves_descriptor",
        "test_leaves_thread",
        "test_leaves_file_to_the_collector",
        "test_hangs",
    }
    assert results["test_warns"] == "Failed: logged and not expected: WARNING here: unannounced"
    assert results["test_does_not_warn"] == "Failed: expected and not logged: WARNING here: announced"
    assert re.fullmatch(r"Failed: left open: descriptor \d+, /dev/null", results["test_leaves_descriptor"])
    assert results["test_leaves_thread"].startswith("Failed: left running: thread ")
    assert "ResourceWarning" in report
    assert "TooSlowError" in results["test_hangs"]
