"""The lab's machine: QEMU with a software CPU, the host's files as its root, one command.

Why it is made like this:

- The CPU is emulated, nested virtualisation included, so that /dev/kvm and vCPUs work inside on any host.
- What the command writes comes over virtio ports and not over the console, so the kernel's own lines
  cannot get into it, nor a terminal's translation of line ends. Its status has a port, too: no status
  means that the kernel stopped first.
- One thread emulates all CPUs. With one for each, a lock holder of the guest waits for a CPU of a busy host, and
  a migration took 1.4 times as long; and QEMU 7.2 hung when a kernel patched its own code as it ran (Debian's do,
  CONFIG_JUMP_LABEL), its CPUs executing a breakpoint that was gone from memory.
- QEMU writes into pipes of ours and never opens the caller's own output, which it would truncate.
- QEMU dies with us, however we die (PR_SET_PDEATHSIG), and reads its initramfs from a memfd: nothing is left.
"""

import os
import re
import selectors
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tools.lab import initramfs
from tools.lab.failure import LabError, Unavailable

QEMU = "qemu-system-x86_64"
PIPES = ("out", "err", "status", "console")
CHUNK = 1 << 16
FRESH = ("/tmp", "/run", "/dev/shm")  # what `init` covers with a tmpfs

# An emulated machine on a busy host can stand still for seconds: no clock is to be called unstable for it,
# and no CPU stuck. All else that goes wrong in the kernel ends the run.
KERNEL_ARGUMENTS = (
    *("console=ttyS0", "loglevel=5", "nokaslr", "panic=-1", "oops=panic"),
    *("tsc=reliable", "nowatchdog", "rcupdate.rcu_cpu_stall_suppress=1"),
)
COMPLAINT = re.compile(
    r"^(\[[^]]*\] ?)*(-+\[ cut here \]-+|WARNING: |BUG: |Oops|Kernel panic|general protection fault"
    r"|INFO: task .* blocked)"
)
COMPLAINT_LINES = 60  # a splat with its registers and its stack


@dataclass(frozen=True)
class Machine:
    kernel: Path
    modules: Path | None = None  # for a kernel that is not of one piece: its /lib/modules/RELEASE
    cpus: int = 2
    memory: str = "2G"
    writable: Sequence[Path] = ()
    visible: Sequence[Path] = ()  # folders to be seen though they lie under FRESH
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    status: int | None  # of the command; None if it did not end
    timed_out: bool
    console: str

    def complaints(self) -> list[str]:
        """What the kernel wrote from its first warning on, or nothing."""
        lines = self.console.splitlines()
        first = next((number for number, line in enumerate(lines) if COMPLAINT.match(line)), len(lines))
        return lines[first : first + COMPLAINT_LINES]


def script(machine: Machine, command: Sequence[str]) -> str:
    variables = [f"{name}={value}" for name, value in machine.environment.items()]
    call = shlex.join(["env", "-i", *variables, *command])
    return f"cd {shlex.quote(os.getcwd())} || exit {os.EX_OSERR}\nexec {call}\n"


def folder_calls(machine: Machine) -> str:
    """For `init`: what to show and what to make writable, in this order, as the one may hold the other."""
    hidden = [path for path in machine.visible if any(path.is_relative_to(fresh) for fresh in FRESH)]
    calls = [["show", str(path)] for path in sorted(set(hidden))]
    calls += [["writable", f"w{number}", str(path)] for number, path in enumerate(machine.writable)]
    return "".join(shlex.join(call) + "\n" for call in calls)


def escaped(path: Path) -> str:
    """A path as the value of a QEMU option."""
    return str(path).replace(",", ",,")


def arguments(machine: Machine, archive: int, pipes: Mapping[str, int]) -> list[str]:
    def share(path: Path, tag: str, mode: str = "") -> list[str]:
        where = f"path={escaped(path)},mount_tag={tag}"
        return ["-virtfs", f"local,{where},security_model=none,multidevs=remap{mode}"]

    line = [QEMU, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    line += ["-accel", "tcg,thread=single", "-cpu", "max", "-smp", str(machine.cpus), "-m", machine.memory]
    line += ["-kernel", str(machine.kernel), "-append", " ".join(KERNEL_ARGUMENTS)]
    line += ["-initrd", f"/proc/self/fd/{archive}"]
    for name, descriptor in pipes.items():
        line += ["-chardev", f"file,id={name},path=/proc/self/fd/{descriptor}"]
    line += ["-serial", "chardev:console", "-device", "virtio-serial-pci"]
    for number, name in enumerate(("out", "err", "status"), start=1):
        line += ["-device", f"virtserialport,chardev={name},nr={number}"]
    line += share(Path("/"), "host", ",readonly=on")
    for number, path in enumerate(machine.writable):
        line += share(path, f"w{number}")
    return line


def drain(read_ends: Mapping[str, int], deadline: float) -> Outcome:
    """Forwards output until QEMU closes its ends, or until `deadline`."""
    status, console = bytearray(), bytearray()
    sinks: dict[str, Callable[[bytes], None]] = {
        "out": partial(forward, 1),
        "err": partial(forward, 2),
        "status": status.extend,
        "console": console.extend,
    }
    with selectors.DefaultSelector() as selector:
        for name, descriptor in read_ends.items():
            selector.register(descriptor, selectors.EVENT_READ, sinks[name])
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                data = os.read(key.fd, CHUNK)
                if data:
                    key.data(data)
                else:
                    selector.unregister(key.fd)
        timed_out = bool(selector.get_map())
    text = console.decode(errors="replace").replace("\r", "")
    return Outcome(int(status) if status else None, timed_out, text)


def forward(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def run(machine: Machine, command: Sequence[str], seconds: float) -> Outcome:
    """Boots the machine and runs the command in it, at most `seconds` in all. Its output goes to ours."""
    for program in (QEMU, "setpriv"):
        if shutil.which(program) is None:
            raise Unavailable(f"no {program}: apt-get install qemu-system-x86 util-linux")
    if not machine.kernel.is_file():
        raise LabError(f"{machine.kernel}: no such kernel")
    archive = initramfs.build(script(machine, command), folder_calls(machine), machine.modules)
    deadline = time.monotonic() + seconds
    ends = {name: os.pipe() for name in PIPES}
    write_ends = {name: write for name, (_, write) in ends.items()}
    with os.fdopen(os.memfd_create("initramfs"), "wb") as file:
        file.write(archive)
        file.flush()
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *arguments(machine, file.fileno(), write_ends)],
            stdin=subprocess.DEVNULL,
            stdout=write_ends["console"],
            stderr=write_ends["console"],
            pass_fds=(file.fileno(), *write_ends.values()),
        )
    try:
        for descriptor in write_ends.values():
            os.close(descriptor)
        return drain({name: read for name, (read, _) in ends.items()}, deadline)
    finally:
        process.kill()
        process.wait()
        for read, _ in ends.values():
            os.close(read)
