"""What Prometheus is told: names, values, both ways of writing them; and that a real one understands."""

import json
import random
import re
import socket
import struct
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from support.connection import PAGES, frame
from support.daemon import DaemonProcess
from support.polling import PATIENCE, eventually
from support.rawsource import RawSource
from support.vmm import PAGE, Vmm

from gmemd.exposition import PROTOBUF, SCHEMA, TEXT, Distribution, Family, protobuf, text
from gmemd.metrics import CLASSIC_NS, distribution
from gmemd.native.destination import BOUNDS_NS, Histogram
from gmemd.scrape import READ, SCRAPERS, TIMEOUT, WAITING, Scrapes

TREE = Path(__file__).parents[1]
DASHBOARD = TREE / "docs/grafana/gmemd.json"
COUNT = 64
SMALL = Family("gmemd_x_total", "counter", "X.", [({"a": 'q"\\\n'}, 3.0), ({}, 0)])


@pytest.fixture(scope="module")
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, listener: socket.socket) -> Iterator[DaemonProcess]:
    folder = tmp_path_factory.mktemp("daemon")
    # The sources played here give no sign of life.
    settings, sockets = "heartbeat = 10\ndead_after = 60\n", f'metrics = "{folder}/metrics.sock"'
    with DaemonProcess(folder, settings, handed={"metrics": listener.fileno()}, sockets=sockets) as daemon:
        yield daemon
        assert daemon.stop() == 0


def ask(port: int, path: str = "/metrics", method: str = "GET", accept: str = "") -> tuple[HTTPResponse, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request(method, path, headers={"Accept": accept} if accept else {})
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def port_of(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def scraped(daemon: DaemonProcess, listener: socket.socket) -> Iterator[Callable[[], str]]:
    """A migration with one fault answered and one that waits; what is told of it, as text."""
    content = random.Random(7).randbytes(COUNT * PAGE)
    with Vmm(len(content), features=1 << 8) as vmm, RawSource(daemon.port, "scraped", [[0, COUNT, 12]]) as source:
        vmm.hand_off(daemon.socket, "scraped")
        source.join().switch()
        vmm.expect("ready")
        for page, answered in (20, True), (21, False):
            touch = vmm.touch(page)
            source.urgent.read_frame()
            if answered:
                source.urgent.socket.sendall(frame(PAGES, 0, page, 1, content[page * PAGE :][:PAGE]))
                touch.result()
        eventually(lambda: daemon.migration("scraped")["counters"]["waits"] == 1)
        yield lambda: ask(port_of(listener))[1].decode()
        source.background.socket.sendall(frame(PAGES, 0, 0, COUNT, content))
        vmm.expect("done")


def test_values(scraped: Callable[[], str]) -> None:
    told = scraped()
    for line in (
        'gmemd_migrations{phase="running"} 1',
        'gmemd_pages{migration="scraped"} 64',
        'gmemd_missing_pages{migration="scraped"} 63',
        'gmemd_waits{migration="scraped"} 1',
        'gmemd_lanes{migration="scraped"} 2',
        'gmemd_installed_pages_total{migration="scraped",way="urgent"} 1',
        'gmemd_received_bytes_total{migration="scraped",lane="urgent"} 4096',
        'gmemd_fault_duration_seconds_count{migration="scraped",stage="whole"} 1',
        'gmemd_fault_duration_seconds_count{migration="scraped",stage="install"} 1',
    ):
        assert f"{line}\n" in told
    for name in ("longest_wait_seconds", "blocked_seconds_total"):
        assert 0 < float(re.findall(rf'^gmemd_{name}{{migration="scraped"}} (\S+)$', told, re.MULTILINE)[0]) < PATIENCE
    sums = dict(re.findall(r'_sum{migration="scraped",stage="(\w+)"} (\S+)', told))
    assert 0 < float(sums["install"]) < float(sums["whole"])


def names(told: str) -> set[str]:
    return set(re.findall(r"^# TYPE (\w+)", told, re.MULTILINE))


def test_all_are_documented(scraped: Callable[[], str]) -> None:
    document = (TREE / "docs/operate.md").read_text()
    table = document.partition("<!-- metrics -->")[2].partition("<!-- end metrics -->")[0]
    assert names(scraped()) == set(re.findall(r"`(gmemd_\w+)`", table))


def test_dashboard_asks_for_what_there_is(scraped: Callable[[], str]) -> None:
    asked = {name for expression in expressions() for name in re.findall(r"gmemd_\w+", expression)}
    assert {name.removesuffix("_bucket") for name in asked} <= names(scraped())


def test_names_are_by_convention(scraped: Callable[[], str], require_command: Callable[[str], str]) -> None:
    run = subprocess.run(
        [require_command("promtool"), "check", "metrics"], input=scraped(), text=True, capture_output=True, timeout=60
    )
    assert (run.returncode, run.stderr) == (0, "")


def test_a_unix_socket_does_as_well(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    with DaemonProcess(tmp_path, sockets=f'metrics = "{path}"') as daemon:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            with sock.makefile("rb") as file:
                assert b"gmemd_build_info" in file.read()
        assert daemon.stop() == 0


def test_what_else_is_asked(daemon: DaemonProcess, listener: socket.socket) -> None:
    port = port_of(listener)
    assert ask(port, "/")[0].status == 404
    assert ask(port, method="DELETE")[0].status == 405
    assert ask(port)[0].headers["Content-Type"] == TEXT
    assert ask(port, accept=f"{PROTOBUF};q=0.7,text/plain;q=0.3")[0].headers["Content-Type"] == PROTOBUF
    for junk in (b"\x16\x03\x01\x00\x00\r\n\r\n", b"GET\r\n\r\n", b"x" * (1 << 17)):
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock:
            try:
                sock.sendall(junk)
                assert sock.recv(1) == b""
            except ConnectionError:
                continue
    assert daemon.process.poll() is None


async def test_scrapers_that_stall_are_dropped(autojump_clock: trio.testing.MockClock) -> None:
    """As many as are answered at a time; one that came behind them is answered when they are gone."""
    large = [Family("gmemd_x", "gauge", "x" * (1 << 20), [({}, 1.0)])]
    scrapes = Scrapes(lambda: large)
    pairs = [socket.socketpair() for _ in range(SCRAPERS)]
    async with trio.open_nursery() as nursery:
        for ours, theirs in pairs:
            ours.setblocking(False)
            theirs.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            nursery.start_soon(scrapes.serve, trio.socket.from_stdlib_socket(ours))
    assert autojump_clock.current_time() == pytest.approx(TIMEOUT, abs=0.1)
    for _, theirs in pairs:
        assert theirs.recv(READ).startswith(b"HTTP/1.1 200")
        with pytest.raises(BrokenPipeError):
            theirs.send(b"x")
        theirs.close()


async def test_too_many_scrapers_are_dropped_at_once(autojump_clock: trio.testing.MockClock) -> None:
    scrapes = Scrapes(list)
    pairs = [socket.socketpair() for _ in range(SCRAPERS + WAITING + 1)]
    async with trio.open_nursery() as nursery:
        for ours, _ in pairs:
            ours.setblocking(False)
            nursery.start_soon(scrapes.serve, trio.socket.from_stdlib_socket(ours))
        await trio.testing.wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == SCRAPERS + WAITING
    assert autojump_clock.current_time() == pytest.approx(TIMEOUT, abs=0.1)
    for _, theirs in pairs:
        theirs.close()


def test_text() -> None:
    spread = Distribution(3, 1.5, 0, [(0.5, 1), (1.0, 2)], {0: 2, 1: 1})
    assert text([SMALL, Family("gmemd_y_seconds", "histogram", "Y.", [({"a": "b"}, spread)])]).decode() == (
        "# HELP gmemd_x_total X.\n# TYPE gmemd_x_total counter\n"
        'gmemd_x_total{a="q\\"\\\\\\n"} 3.0\ngmemd_x_total 0\n'
        "# HELP gmemd_y_seconds Y.\n# TYPE gmemd_y_seconds histogram\n"
        'gmemd_y_seconds_bucket{a="b",le="0.5"} 1\ngmemd_y_seconds_bucket{a="b",le="1.0"} 2\n'
        'gmemd_y_seconds_bucket{a="b",le="+Inf"} 3\ngmemd_y_seconds_sum{a="b"} 1.5\ngmemd_y_seconds_count{a="b"} 3\n'
    )


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """A protobuf message: its field numbers and their values, unsigned, double or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        field, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield field, varint()
        elif wire_type == 1:
            yield field, struct.unpack_from("<d", message, at)[0]
            at += 8
        else:
            length = varint()
            yield field, message[at : at + length]
            at += length


def signed(value: int) -> int:
    return value >> 1 ^ -(value & 1)


def test_protobuf_spans_tell_every_bucket(rng: random.Random) -> None:
    for _ in range(50):
        buckets = {number: rng.randrange(1, 1000) for number in rng.sample(range(-60, 60), rng.randrange(1, 40))}
        family = Family("y", "histogram", "", [({}, Distribution(sum(buckets.values()), 1.0, 0, [], buckets))])
        message = protobuf([family])
        length = message[1] << 7 | message[0] & 0x7F if message[0] & 0x80 else message[0]
        metric = dict(fields(message[2 if message[0] & 0x80 else 1 :][:length]))[4]
        histogram = list(fields(dict(fields(metric))[7]))
        assert (5, SCHEMA << 1) in histogram
        deltas = iter(signed(value) for field, value in histogram if field == 13)
        number = count = 0
        read = {}
        for span in (dict(fields(value)) for field, value in histogram if field == 12):
            number += signed(span[1])
            for _ in range(span[2]):
                count += next(deltas)
                read[number] = count
                number += 1
        assert read == buckets


def test_distribution_is_what_was_recorded(rng: random.Random) -> None:
    """To the precision of our buckets, which are 6 % wide."""
    counts = [0] * len(BOUNDS_NS)
    values = [int(10 ** rng.uniform(0, 11)) for _ in range(2000)]
    for value in values:
        counts[sum(bound <= value for bound in BOUNDS_NS) - 1] += 1
    spread = distribution(Histogram(counts, sum(values)))
    assert (spread.count, spread.sum) == (len(values), sum(values) / 1e9)
    for (bound, count), bound_ns in zip(spread.cumulative, CLASSIC_NS, strict=True):
        assert bound == bound_ns / 1e9
        assert count == sum(value < bound_ns for value in values)
    assert spread.zeros + sum(spread.exponential.values()) == spread.count
    below = spread.zeros
    for number in sorted(spread.exponential):
        below += spread.exponential[number]
        end = 2 ** (number / 2**SCHEMA) * 1e9
        assert sum(value < end / 1.07 for value in values) <= below <= sum(value <= end * 1.07 for value in values)


def expressions() -> list[str]:
    """What the dashboard's panels ask, with its variables filled in."""
    found = [target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]]
    variables = {"$instance": ".*", "$migration": ".*", "$__rate_interval": "1m"}
    for name, value in variables.items():
        found = [expression.replace(name, value) for expression in found]
    return found


@pytest.fixture
def prometheus(
    tmp_path: Path, listener: socket.socket, require_command: Callable[[str], str]
) -> Iterator[Callable[[str], Any]]:
    """A real one that scrapes the daemon; what it gives answers queries."""
    program = require_command("prometheus")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = port_of(free)
    config = {
        "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms"},
        "scrape_configs": [{"job_name": "gmemd", "static_configs": [{"targets": [f"127.0.0.1:{port_of(listener)}"]}]}],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))
    command = [
        program,
        f"--config.file={tmp_path}/prometheus.yml",
        f"--storage.tsdb.path={tmp_path}/data",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=native-histograms",
    ]

    def query(expression: str) -> Any:
        url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
                told = json.load(answer)
        except urllib.error.URLError:
            return []
        assert told["status"] == "success", told
        return told["data"]["result"]

    with (tmp_path / "prometheus.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield query
        finally:
            process.terminate()


def test_a_real_prometheus(scraped: Callable[[], str], prometheus: Callable[[str], Any]) -> None:
    """It takes the protobuf, native histograms in it, and the dashboard's questions."""
    scraped()
    eventually(lambda: prometheus('gmemd_waits{migration="scraped"}'))

    def value(expression: str) -> float:
        (found,) = prometheus(expression)
        return float(found["value"][1])

    assert value("up") == 1
    assert value('gmemd_pages{migration="scraped"}') == COUNT
    assert value('gmemd_installed_pages_total{way="urgent"}') == 1
    assert value('histogram_count(gmemd_fault_duration_seconds{stage="whole"})') == 1
    total = value('histogram_sum(gmemd_fault_duration_seconds{stage="whole"})')
    median = value('histogram_quantile(0.5, gmemd_fault_duration_seconds{stage="whole"})')
    assert total / 1.25 < median < total * 1.25
    for expression in expressions():
        prometheus(expression)
