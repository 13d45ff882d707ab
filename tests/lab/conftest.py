"""The lab's own fixtures.

Under GMEMD_LAB=1, which `make lab-test` sets, the kernel is said to have all that the lab kernel has: what
would be skipped for want of it fails.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # for tools.lab, which is in no package


@pytest.fixture
def lacking() -> Callable[[str], None]:
    """`lacking(what)`: this kernel has no such thing."""

    def end(what: str) -> None:
        if os.environ.get("GMEMD_LAB") == "1":
            pytest.fail(what, pytrace=False)
        pytest.skip(what)

    return end
