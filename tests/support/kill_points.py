"""A build of gmemd in which the daemon can be made to die at chosen points (gmemd/native/kill_point.h)."""

from pathlib import Path

import pytest

from support.builds import build


@pytest.fixture(scope="session")
def kill_points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("kill-points"), "-DGM_KILL_POINTS")
