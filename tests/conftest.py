"""What every test gets: its place in the order, a deadline, a seed, and a look at what it left behind.

A test fails if it logged a warning that it had not announced (`expect_log`), or left a descriptor or a thread
behind. Layers run from the lowest up, so that the first failure is the one nearest to its cause.
"""

import gc
import inspect
import logging
import os
import random
import re
import shutil
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Generator, Iterator
from functools import wraps
from pathlib import Path

import hypothesis
import pytest
import trio
from support.pace import SLOWER

from gmemd.errors import GmemdError
from gmemd.native import check, lib

# From the lowest up. A module belongs to the layer whose pattern fits what follows `test_` in its name.
LAYERS = {
    "native": "native",
    "base": "own_checks|address|config|notify|log|errors",
    "wire": "wire|state|trace",
    "migrate": "migrate|source|destination|lane",
    "daemon": "daemon|handoff|status|metrics|probe|cli",
    "process": "",  # the rest: whole processes
    "package": "packaging",
}
REST = "process"
WITHOUT_GUESTS = {"base", "wire"}
DEADLINE = 60.0  # seconds for an async test, more where the CPU is emulated; most take milliseconds
LEAVING = 1.0  # seconds that a thread may stay on the kernel's list after it was joined
FAILED = pytest.StashKey[bool]()
SPENT = pytest.StashKey[defaultdict[str, float]]()


def layer_of(path: Path) -> str:
    name = path.stem.removeprefix("test_")
    fits = (layer for layer, pattern in LAYERS.items() if pattern and re.match(pattern, name))
    return next(fits, REST)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--layer", action="append", choices=list(LAYERS), help="run only this layer; repeatable")
    parser.addoption("--seed", type=int, help="the seed of all tests, instead of one fixed for each")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "leaks(reason): leaves descriptors or threads behind on purpose")
    config.addinivalue_line("markers", "daemon(settings): of a module: what its daemon is configured with")
    config.addinivalue_line("markers", f"deadline(seconds): an async test that may take over {DEADLINE:g} s")
    # The same inputs at each run, and none too slow: a host may have other work to do.
    hypothesis.settings.register_profile("steady", deadline=None, derandomize=True, database=None)
    hypothesis.settings.load_profile("steady")
    config.stash[SPENT] = defaultdict(float)
    os.environ["PYTHONFAULTHANDLER"] = "1"  # for the processes that tests start


def pytest_sessionstart(session: pytest.Session) -> None:
    """Without a userfaultfd that takes the kernel's faults, hardly anything could be shown: that is said at once."""
    if not set(session.config.getoption("--layer") or LAYERS) - WITHOUT_GUESTS:
        return
    try:
        os.close(check(lib.gm_uffd_open, 0))
    except GmemdError as error:
        advice = "be root, or have the rights that `gmemd doctor` names; or run --layer base --layer wire alone"
        pytest.exit(f"these tests handle faults of guests: {error}: {advice}", os.EX_UNAVAILABLE)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    order = list(LAYERS)
    items.sort(key=lambda item: order.index(layer_of(item.path)))
    wanted = config.getoption("--layer") or order
    config.hook.pytest_deselected(items=[item for item in items if layer_of(item.path) not in wanted])
    items[:] = [item for item in items if layer_of(item.path) in wanted]
    for item in items:
        if isinstance(item, pytest.Function):
            give_deadline(item)


def give_deadline(item: pytest.Function) -> None:
    marker = item.get_closest_marker("deadline")
    seconds = marker.args[0] if marker else DEADLINE
    given = getattr(item.obj, "hypothesis", None)
    if given is not None and inspect.iscoroutinefunction(given.inner_test):
        given.inner_test = with_deadline(given.inner_test, seconds * SLOWER)
    elif inspect.iscoroutinefunction(item.obj):
        item.obj = with_deadline(item.obj, seconds * SLOWER)


def with_deadline(test: Callable[..., Awaitable[None]], seconds: float) -> Callable[..., Awaitable[None]]:
    @wraps(test)
    async def limited(*args: object, **kwargs: object) -> None:
        with trio.fail_after(seconds):
            await test(*args, **kwargs)

    return limited


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.config.stash[SPENT][layer_of(item.path)] += report.duration
    if report.failed:
        item.stash[FAILED] = True
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    spent = config.stash[SPENT]
    terminalreporter.section("seconds by layer")
    terminalreporter.line("  ".join(f"{layer} {spent[layer]:.1f}" for layer in LAYERS if layer in spent))


class LogCheck(logging.Handler):
    """Collects what is logged from WARNING up, and the patterns that say what should be."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        self.expected: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(f"{record.levelname} {record.name}: {record.getMessage()}")

    def verdict(self) -> Iterator[str]:
        for message in self.messages:
            if not any(re.search(pattern, message) for pattern in self.expected):
                yield f"logged and not expected: {message}"
        for pattern in self.expected:
            if not any(re.search(pattern, message) for message in self.messages):
                yield f"expected and not logged: {pattern}"


@pytest.fixture
def log_check() -> Iterator[LogCheck]:
    check = LogCheck()
    logging.getLogger().addHandler(check)
    yield check
    logging.getLogger().removeHandler(check)


@pytest.fixture
def expect_log(log_check: LogCheck) -> Callable[[str], None]:
    """`expect_log(pattern)`: a record of WARNING or worse must come whose "LEVEL logger: message" fits."""
    return log_check.expected.append


def descriptors() -> dict[int, str]:
    """What each open descriptor of this process is."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the one that listed them
            continue
    return found


def threads() -> dict[int, str]:
    """The name of each thread, Python's and native ones, without the workers that trio keeps in reserve."""
    idle = {thread.native_id for thread in threading.enumerate() if thread.name.startswith("Trio thread")}
    found = {}
    for task in map(int, os.listdir("/proc/self/task")):
        try:
            found[task] = Path(f"/proc/self/task/{task}/comm").read_text().strip()
        except OSError:  # it ended just now
            continue
    return {task: name for task, name in found.items() if task not in idle}


def new_threads(before: dict[int, str]) -> dict[int, str]:
    """Polls, as the kernel delists a thread a moment after its join has returned, and tells nobody."""
    end = time.monotonic() + LEAVING
    while True:
        left = {task: name for task, name in threads().items() if task not in before}
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest, log_check: LogCheck) -> Iterator[None]:
    """The checks after each test. After a failed one they would only find what its traceback holds on to."""
    fds_before, threads_before = descriptors(), threads()
    yield
    gc.collect()  # so that a ResourceWarning, which is an error, comes up in the test that it belongs to
    if request.node.stash.get(FAILED, False):
        return
    problems = list(log_check.verdict())
    if request.node.get_closest_marker("leaks") is None:
        fds = {fd: what for fd, what in descriptors().items() if fds_before.get(fd) != what}
        tasks = new_threads(threads_before)
        problems += [f"left open: descriptor {fd}, {what}" for fd, what in fds.items()]
        problems += [f"left running: thread {task}, {name}" for task, name in tasks.items()]
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The same for a test at each run, unless --seed says otherwise. A failure shows it."""
    given = request.config.getoption("--seed")
    value = zlib.crc32(request.node.nodeid.encode()) if given is None else int(given)
    request.node.add_report_section("setup", "seed", str(value))
    return value


@pytest.fixture
def rng(seed: int) -> random.Random:
    return random.Random(seed)


@pytest.fixture
def require_command() -> Callable[[str], str]:
    """`require_command(name)`: the path of a program of this host, or the test is skipped."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            pytest.skip(f"{name} is not installed")
        return path

    return find


@pytest.fixture
def require_kvm() -> None:
    """Skips the test where no VM can be made."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        pytest.skip(f"/dev/kvm: {error.strerror}")
