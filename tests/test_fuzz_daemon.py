"""What `make fuzz-daemon` does for minutes, for a moment: a daemon among peers that send what is nearly right."""

from pathlib import Path

from fuzz import sessions


def test_a_daemon_survives_what_is_nearly_right(tmp_path: Path, seed: int) -> None:
    outcome = sessions.attack(tmp_path, 200, seed)
    assert outcome.growth_kib <= sessions.GROWTH_KIB
    assert outcome.descriptors <= 0
