"""How to play a recording."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gmemd_tools.network.conditions import Conditions


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """At `speed` times the recorded pace, None for flat out.

    With `on_demand`, nothing is sent but what is touched, and what no thread touched is touched at the end.
    `settings` are the daemon's, by table and key; `programs` is a folder with gmemd and gmemd-source of another build,
    or a virtual environment with them; `network` is what lies between the two.
    """

    speed: float | None = 1.0
    on_demand: bool = False
    seed: int = 1
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    source_arguments: Sequence[str] = ()
    programs: Path | None = None
    network: Conditions | None = None
    stages: Path | None = None  # a folder for the stamps of both ends

    @property
    def pace(self) -> float:
        """What the recorded gaps are multiplied with."""
        return 1 / self.speed if self.speed else 0.0
