"""The reference VMM, a C program that is built beside this file."""

from pathlib import Path

VMM = Path(__file__).with_name("gmemd-vmm")
