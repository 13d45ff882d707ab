"""The C programs of the benchmarks: built beside the daemon that they measure, run to the end, read as JSON."""

import fcntl
import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, Literal

HERE = Path(__file__).resolve().parent
VMM = HERE.parent / "vmm"
BUILT = HERE.parents[1] / "build/bench"
SHARED = ("arguments.c", "loopback.c", "samples.c", "touch.c", "vcpu.c")
FLAGS = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
# A guest has no C library below it, and no one who would save its vector registers or stack beyond the pointer.
BARE = [*FLAGS, "-ffreestanding", "-nostdlib", "-static", "-fno-pic", "-mno-red-zone", "-mno-sse",
        "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-Wl,--build-id=none",
        "-Wl,--no-warn-rwx-segments"]  # fmt: skip
PATIENCE = 60.0  # seconds; nothing here takes half of it
ENDLESS = 2**64 - 1
WAIT_NS = 15_000  # a touch on a vCPU that took so long has waited for its page
KVM = Path("/dev/kvm")
KVM_CREATE_VM = 0xAE01

Result = dict[str, Any]


class ProgramError(Exception):
    """A program of ours, or one that is measured, did not do what it is for."""


@cache
def kvm_missing() -> str | None:
    """Why there can be no vCPU here, if so."""
    try:
        with KVM.open("r+b", buffering=0) as kvm:
            os.close(fcntl.ioctl(kvm, KVM_CREATE_VM, 0))
    except OSError as error:
        return f"{KVM}: {error.strerror}"
    return None


@cache
def program(name: str) -> Path:
    """Builds one of `floor`, `guest`, `stream`, `cost`; returns where it is."""
    BUILT.mkdir(parents=True, exist_ok=True)
    vmm = [path for path in sorted(VMM.glob("*.c")) if path.name != "main.c"]
    sources = [HERE / f"{name}.c", *(HERE / shared for shared in SHARED), *vmm]
    _compile([*FLAGS, "-D_GNU_SOURCE", "-pthread", "-o", str(BUILT / name), *map(str, sources)])
    return BUILT / name


@cache
def image(
    kind: Literal["elf32-i386", "binary"], pages: int, *, random: bool, think_ns: int = 0, touches: int = ENDLESS
) -> Path:
    """Builds the guest that touches so many pages on a vCPU: as multiboot wants it, or as it lies in memory."""
    name = f"image-{pages}-{'random' if random else 'sequential'}-{think_ns}-{touches}"
    cycles = tsc_mhz() / 1000
    BUILT.mkdir(parents=True, exist_ok=True)
    _compile([*BARE, f"-DPAGES={pages}u", f"-DRANDOM={random:d}", f"-DTOUCHES={touches}u",
              f"-DTHINK_CYCLES={int(think_ns * cycles)}u", f"-DWAIT_CYCLES={int(WAIT_NS * cycles)}u",
              "-T", str(HERE / "image.ld"), "-o", str(BUILT / name), str(HERE / "image.c")])  # fmt: skip
    made = BUILT / f"{name}.{kind}"
    subprocess.run(["objcopy", "-O", kind, str(BUILT / name), str(made)], check=True)
    return made


def tsc_mhz() -> float:
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
