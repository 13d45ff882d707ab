"""What a run of the soak follows from."""

import random

import pytest

from gmemd_tools import tmpfs
from gmemd_tools.soak.run import machine


def test_a_machine_follows_from_its_seed_on_any_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed run is repeated elsewhere by its seed: that large folios are missing there changes nothing else."""
    backings = set()
    for seed in range(20):
        monkeypatch.setattr(tmpfs, "missing", lambda: None)
        drawn = vars(machine(random.Random(seed)))
        monkeypatch.setattr(tmpfs, "missing", lambda: "large folios: this kernel has none")
        assert vars(machine(random.Random(seed))) == drawn | {"backing": "memfd"}
        backings.add(drawn["backing"])
    assert backings == {"memfd", "tmpfs"}
