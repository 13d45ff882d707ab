"""The C programs of the benchmarks: built beside the daemon that they measure, run to the end, read as JSON."""

import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
VMM = HERE.parent / "vmm"
BUILT = HERE.parents[1] / "build/bench"
SHARED = ("arguments.c", "loopback.c", "samples.c", "touch.c")
FLAGS = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
# A guest has no C library below it, and no one who would save its vector registers or stack beyond the pointer.
BARE = [*FLAGS, "-ffreestanding", "-nostdlib", "-static", "-fno-pic", "-mno-red-zone", "-mno-sse",
        "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-Wl,--build-id=none",
        "-Wl,--no-warn-rwx-segments"]  # fmt: skip
PATIENCE = 60.0  # seconds; nothing here takes half of it

Result = dict[str, Any]


class ProgramError(Exception):
    """A program of ours, or one that is measured, did not do what it is for."""


@cache
def program(name: str) -> Path:
    """Builds one of `floor`, `guest`, `stream`, `cost`; returns where it is."""
    BUILT.mkdir(parents=True, exist_ok=True)
    vmm = [path for path in sorted(VMM.glob("*.c")) if path.name != "main.c"]
    sources = [HERE / f"{name}.c", *(HERE / shared for shared in SHARED), *vmm]
    _compile([*FLAGS, "-D_GNU_SOURCE", "-pthread", "-o", str(BUILT / name), *map(str, sources)])
    return BUILT / name


@cache
def qemu_guest(pages: int, *, random: bool, think_ns: int = 0) -> Path:
    """Builds the guest for QEMU that touches so many pages; an ELF file of 32 bits, as multiboot wants it."""
    cycles = int(think_ns * _tsc_mhz() / 1000)
    BUILT.mkdir(parents=True, exist_ok=True)
    whole = BUILT / f"qemu-guest-{pages}-{'random' if random else 'sequential'}-{think_ns}"
    _compile([*BARE, f"-DPAGES={pages}", f"-DRANDOM={random:d}", f"-DTHINK_CYCLES={cycles}",
              "-T", str(HERE / "qemu_guest.ld"), "-o", str(whole), str(HERE / "qemu_guest.c")])  # fmt: skip
    small = whole.with_suffix(".elf")
    subprocess.run(["objcopy", "-O", "elf32-i386", str(whole), str(small)], check=True)
    return small


def _tsc_mhz() -> float:
    """How fast the time stamp counter of this CPU is, about: what a guest without a clock has to think by."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")), 0.0)


def run(name: str, *arguments: object) -> Result:
    """Runs a program to its end; returns the last object that it printed."""
    done = subprocess.run([str(program(name)), *map(str, arguments)], stdout=subprocess.PIPE, timeout=PATIENCE)
    lines = done.stdout.splitlines()
    result: Result = json.loads(lines[-1]) if lines else {}
    if done.returncode or not lines:
        raise ProgramError(f"{name}: exit status {done.returncode}: {result.get('message', 'no word')}")
    return result


def _compile(arguments: list[str]) -> None:
    subprocess.run(["gcc", *arguments], check=True)
