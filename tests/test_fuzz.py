"""What `make fuzz` does for hours, for a moment: every target with its corpus, and with inputs near it."""

import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz import natively, targets
from hypothesis import given
from hypothesis import strategies as st
from support.polling import PATIENCE

HERE = Path(__file__).parent / "fuzz"

CORPUS = {
    name: [path.read_bytes() for path in sorted((HERE / "corpus" / name).iterdir())]
    for name in [*natively.TARGETS, *targets.TARGETS]
}
MUTATIONS = 1000


@pytest.fixture(scope="module", autouse=True)
def no_warnings_of_damage() -> Iterator[None]:
    log = logging.getLogger("gmemd.trace")
    log.setLevel(logging.CRITICAL)
    yield
    log.setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets")
    natively.build(folder, ("gcc",), (), natively.SHARED)
    return folder


@pytest.mark.parametrize("name", natively.TARGETS)
def test_native_targets(programs: Path, name: str, seed: int) -> None:
    files = sorted((HERE / "corpus" / name).iterdir())
    command = [str(programs / name), str(MUTATIONS), str(seed), *map(str, files)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) == len(files) + MUTATIONS


@pytest.mark.parametrize("name", targets.TARGETS)
def test_corpus(name: str) -> None:
    for data in CORPUS[name]:
        targets.TARGETS[name](data)


@st.composite
def near(draw: st.DrawFn, corpus: list[bytes]) -> bytes:
    """An input of the corpus, some of it replaced."""
    data = draw(st.sampled_from(corpus))
    at = draw(st.integers(0, len(data)))
    return data[:at] + draw(st.binary(max_size=12)) + data[at + draw(st.integers(0, 12)) :]


@pytest.mark.parametrize("name", targets.TARGETS)
def test_inputs_near_the_corpus(name: str) -> None:
    @given(data=near(CORPUS[name]) | st.binary(max_size=100))
    def run(data: bytes) -> None:
        targets.TARGETS[name](data)

    run()
