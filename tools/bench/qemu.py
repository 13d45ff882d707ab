"""QEMU's postcopy, measured: two of them over loopback TCP, and a guest that does nothing but touch its memory."""

import shutil
import subprocess
import time
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from gmemd_tools.bench.content import PAGE, warm
from gmemd_tools.bench.programs import PATIENCE, ProgramError, Result, image, kvm_missing, tsc_mhz
from gmemd_tools.bench.qmp import Qmp

QEMU = "qemu-system-x86_64"
# As in image.h: where the guest's program ends, what it says, and what it writes down: eight bytes each, waits last.
LOW_MEMORY = 16 << 20
FILLED, WRONG = b"F", b"W"
TOLD, TOLD_BYTES, TOLD_WAITS = 4 << 20, 1 << 20, 5
PRECOPY_BYTES_PER_S = 1 << 20  # next to nothing: all memory moves after the guest
# The machine without firmware to speak of starts in no time; TCG is what there is without KVM.
ACCELERATORS = {"kvm": ["-accel", "kvm", "-machine", "microvm"], "tcg": ["-accel", "tcg"]}


def missing() -> str | None:
    """Why QEMU cannot be measured here, if it cannot."""
    return None if shutil.which(QEMU) else f"{QEMU} is not installed: apt-get install qemu-system-x86"


def move(folder: Path, memory: int, *, random: bool, think_ns: int = 0, preempt: bool = True) -> Result:
    """Moves a guest that touches `memory` bytes; what QEMU says of it."""
    accelerator = "tcg" if kvm_missing() else "kvm"
    kernel = image("elf32-i386", memory // PAGE, random=random, think_ns=think_ns)
    common = [QEMU, *ACCELERATORS[accelerator], "-m", f"{(LOW_MEMORY + memory) >> 20}M", "-display", "none",
              "-nodefaults", "-kernel", str(kernel), "-global", "isa-debugcon.iobase=0x402"]  # fmt: skip
    warm(memory)
    with ExitStack() as stack:
        source = stack.enter_context(_qemu(common, folder / "qemu-source"))
        there = stack.enter_context(_qemu([*common, "-incoming", "defer"], folder / "qemu-destination"))
        _wait_until_filled(folder / "qemu-source.debug")
        _switch_on(source, "events", "postcopy-ram", *["postcopy-preempt"] * preempt)
        _switch_on(there, "events", "postcopy-ram", "postcopy-blocktime", *["postcopy-preempt"] * preempt)
        source.command("migrate-set-parameters", **{"max-bandwidth": PRECOPY_BYTES_PER_S, "max-postcopy-bandwidth": 0})
        before = _waits(source, folder)
        result = _move(source, there)
        result["guest_waits_us"] = _waits(there, folder)[len(before) :]
        if WRONG in (folder / "qemu-destination.debug").read_bytes():
            raise ProgramError("the guest in QEMU found a page without its content")
        return {"accelerator": accelerator} | result


def _move(source: Qmp, there: Qmp) -> Result:
    there.command("migrate-incoming", uri="tcp:127.0.0.1:0")
    address = there.command("query-migrate")["socket-address"][0]
    uri = f"tcp:{address['host']}:{address['port']}"
    source.command("migrate", uri=uri)
    source.migration("active")
    source.command("migrate-start-postcopy")
    for monitor in source, there:
        if monitor.migration("completed", "failed") == "failed":
            raise ProgramError("QEMU's migration failed")
    while not (sent := source.command("query-migrate")).get("total-time"):
        time.sleep(0.001)  # it says "completed" before it has added up
    received = there.command("query-migrate")
    requests = sent["ram"]["postcopy-requests"]
    blocked_us = received["postcopy-blocktime"] * 1000
    return {
        "total_us": sent["total-time"] * 1000,
        "downtime_us": sent["downtime"] * 1000,
        "requests": requests,
        "blocked_us": blocked_us,
        "wait_us": blocked_us / requests if requests else 0.0,
        "blocked_share": blocked_us / (sent["total-time"] * 1000),
        "postcopy_bytes": sent["ram"]["postcopy-bytes"],
    }


def _waits(monitor: Qmp, folder: Path) -> list[float]:
    """How long the guest has waited so far, each time, by its own clock."""
    file = folder / "qemu-told"
    monitor.command("pmemsave", val=TOLD, size=TOLD_BYTES, filename=str(file))
    count, *waits = array("Q", file.read_bytes())[TOLD_WAITS:]
    return [cycles / tsc_mhz() for cycles in waits[:count]]


@contextmanager
def _qemu(command: list[str], name: Path) -> Iterator[Qmp]:
    """A running QEMU, by its monitor."""
    monitor, debug = name.with_suffix(".monitor"), name.with_suffix(".debug")
    debug.write_bytes(b"")
    with name.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(
            [*command, "-debugcon", f"file:{debug}", "-qmp", f"unix:{monitor},server=on,wait=off"], stderr=log
        )
    try:
        qmp = Qmp(monitor)
        yield qmp
        qmp.close()
    finally:
        process.kill()
        process.wait(PATIENCE)
        monitor.unlink(missing_ok=True)


def _switch_on(qmp: Qmp, *capabilities: str) -> None:
    qmp.command("migrate-set-capabilities", capabilities=[{"capability": c, "state": True} for c in capabilities])


def _wait_until_filled(debug: Path) -> None:
    """The firmware may write to the port, too; the guest's letter comes last."""
    deadline = time.monotonic() + PATIENCE
    while not debug.read_bytes().endswith(FILLED):
        if time.monotonic() > deadline:
            raise ProgramError("the guest in QEMU does not come to its work")
        time.sleep(0.01)
