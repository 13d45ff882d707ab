"""How much longer all takes where the CPU is emulated: what tests wait for, they wait for so many times as long.

A lane may be still for longer than `dead_after` there, and be made anew.
"""

from pathlib import Path

EMULATED = Path("/run/lab-command").exists()  # what tools/lab/init leaves
SLOWER = 10 if EMULATED else 1
