"""Reports: made of real runs, read as text, and looked at with a browser. And files that are no runs."""

import gzip
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from gmemd.errors import DataError
from gmemd.native.memory import Region
from gmemd.trace import TraceWriter
from gmemd_tools.replay import cli, patterns, runfile
from gmemd_tools.replay.recording import load
from gmemd_tools.replay.run import replay
from gmemd_tools.replay.setup import Setup

PAGES = 2048
SECTIONS = ["map", "latency", "stages", "progress", "vcpus"]
WIDTH, HEIGHT = 1200, 2700


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One trace, played with nothing sent unasked, and with everything sent in its order."""
    folder = tmp_path_factory.mktemp("runs")
    trace = folder / "t.gmtrace"
    plan = patterns.Plan(pages=PAGES, threads=3, faults=1500, gap_ns=100_000, writes=0.3, seed=1)
    with TraceWriter(trace, "m", [Region(offset=0, size=PAGES * 4096, page_size=4096, gpa=0)]) as writer:
        writer.add(patterns.synthesise("phased", plan))
    kept = [folder / "asked.gmrun", folder / "ordered.gmrun"]
    replay(load([trace]), Setup(on_demand=True), kept[0])
    replay(load([trace]), Setup(source_arguments=[f"--order={trace}"]), kept[1])
    return kept


class Page(HTMLParser):
    """What a report has in it."""

    def __init__(self, html: Path) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.pictures = 0
        self.from_elsewhere: list[str] = []
        self.words = ""
        self.feed(html.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.pictures += tag == "svg"
        if tag == "section":
            self.sections.append(found["id"])
        for name in ("src", "href", "xlink:href"):
            if not found.get(name, "#").startswith(("#", "data:")):
                self.from_elsewhere.append(found[name])
        assert tag not in ("script", "link", "iframe")

    def handle_data(self, data: str) -> None:
        self.words += data


def draw(*arguments: str | Path) -> Page:
    """In a process of its own: matplotlib keeps its fonts open."""
    command = [sys.executable, "-m", "gmemd_tools.replay.cli", "report", *map(str, arguments)]
    ended = subprocess.run(command, text=True, capture_output=True, timeout=50)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    return Page(Path(arguments[-1]))


def test_one_run(runs: list[Path], tmp_path: Path) -> None:
    page = draw(runs[0], "-o", tmp_path / "r.html")
    assert page.sections == SECTIONS
    assert (page.pictures, page.from_elsewhere) == (len(SECTIONS), [])
    waits = runfile.read(runs[0]).result["faults"]
    assert f"{waits} of 1500 accesses" in page.words
    assert "every page was right" in page.words


def test_two_runs_seen_by_a_browser(runs: list[Path], tmp_path: Path) -> None:
    """Every picture is where it should be, and has something in it."""
    html = tmp_path / "r.html"
    page = draw(*runs, "--png", tmp_path / "png", "-o", html)
    assert page.sections == SECTIONS
    first, last = (runfile.read(path).result["faults"] for path in runs)
    assert last < first
    assert f"{1 - last / first:.0%} fewer waits" in page.words
    assert f"from {first:,}" in page.words
    ids = re.findall(r'\bid="([^"]+)"', html.read_text())
    assert len(set(ids)) == len(ids)
    assert sorted(path.stem for path in (tmp_path / "png").iterdir()) == sorted(SECTIONS)
    with Image.open(screenshot(html, tmp_path / "r.png")) as seen:
        assert seen.size == (WIDTH, HEIGHT)
        grey = seen.convert("L").tobytes()
    rows = [grey[y * WIDTH : (y + 1) * WIDTH] for y in range(0, HEIGHT * 3 // 4, 4)]
    inked = sum(sum(value < 230 for value in row) > WIDTH // 100 for row in rows)
    assert inked > 0.3 * len(rows)


def screenshot(html: Path, png: Path) -> Path:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium here: make browser installs it")
    subprocess.run(
        [
            *(browser, "--headless", "--disable-gpu", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"),
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
            *(f"--user-data-dir={png.parent / 'profile'}", f"--screenshot={png}", html.as_uri()),
        ],
        check=True,
        capture_output=True,
        timeout=50,
    )
    return png


def test_a_run_is_read_as_it_was_written(runs: list[Path]) -> None:
    run = runfile.read(runs[0])
    assert run.name == "asked"
    assert len(run.touches) == run.result["touches"] == 1500
    assert run.touches[0].began_ns == 0
    assert run.looks[0][1]["pages"] == PAGES
    assert run.result["stages"]["faults"] > 0
    assert list(run.result["stages"]["steps"])[-1] == "running"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not a run that gmemd-replay has kept"),
        (b"GMTRACE", "not a run that gmemd-replay has kept: BadGzipFile"),
        (gzip.compress(b"[]\n"), "not a run that gmemd-replay has kept"),
        (gzip.compress(b'{"gmemd-replay": 2}\n'), "version 2 of a run"),
        (gzip.compress(b'{"gmemd-replay": 1, "result": {}, "regions": [], "looks": []}\n' + bytes(7)), "damaged"),
    ],
)
def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, why: str) -> None:
    path = tmp_path / "t.gmrun"
    path.write_bytes(content)
    assert cli.main(["report", str(path), "-o", str(tmp_path / "r.html")]) == DataError.exit_code
    assert f"{path}: " in (said := capsys.readouterr().err)
    assert why in said


def test_a_run_that_is_cut_off(runs: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "t.gmrun"
    path.write_bytes(runs[0].read_bytes()[:-100])
    with pytest.raises(DataError, match="cut off or damaged"):
        runfile.read(path)


def test_more_than_two_runs(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", *map(str, [*runs, runs[0]]), "-o", str(tmp_path / "r.html")]) == os.EX_USAGE
    assert "one run, or two" in capsys.readouterr().err
