"""What the host gives this process besides the kernel's memory: sockets, limits, and what stands around it.

Each function tries or reads one thing and returns a `Finding`. An OSError that comes out of one means that it could
not be tried.
"""

import grp
import mmap
import os
import pwd
import re
import resource
import socket
import stat
import struct
import threading
from contextlib import suppress
from pathlib import Path

from gmemd.native import lib
from gmemd.probe_kernel import Finding, say_errno

PROC = Path("/proc/self")
HUGE_PAGES = Path("/sys/kernel/mm/hugepages")
SOCKET_DEADLINE = 5.0  # seconds; loopback takes microseconds

# linux/tcp.h, linux/tls.h and asm-generic/socket.h: numbers that Python does not name
TCP_ULP = 31
SOL_TLS = 282
TLS_TX, TLS_RX = 1, 2
TLS_1_3, AES_GCM_128 = 0x0304, 51
SO_PEERPIDFD = 77

SPARSE_MEMORY = 1 << 40  # bytes: a guest larger than that is rare
FIRST_NICE = lib.GM_FIRST_NICE
LARGE_FOLIO = 2 << 20
OPEN_FILES = 1024  # 16 migrations whose VMMs hand over the most descriptors that one message holds, 64
SOCKET_BUFFER = 4 << 20  # bytes: 25 Gbit/s with a round trip of 1.3 ms
CLEAR_OF_LSM = ("", "unconfined", "kernel")
NO_LIMIT = 1 << 62  # cgroup v1 has no word for "none", but writes a number near 2**63


def owner_and_mode(path: str) -> str:
    """`mode 0600, owner root:root`, or why that cannot be told."""
    try:
        found = os.stat(path)
    except OSError as error:
        return say_errno(error.errno or 0)
    user, group = str(found.st_uid), str(found.st_gid)
    with suppress(KeyError):
        user = pwd.getpwuid(found.st_uid).pw_name
    with suppress(KeyError):
        group = grp.getgrgid(found.st_gid).gr_name
    return f"{path} has mode {stat.S_IMODE(found.st_mode):04o}, owner {user}:{group}"


def status_field(name: str) -> str:
    """A field of /proc/self/status."""
    found = re.search(rf"^{name}:\s*(.*)$", (PROC / "status").read_text(), re.MULTILINE)
    return found[1] if found else ""


# Sockets and processes


def _tls_key() -> bytes:
    """struct tls12_crypto_info_aes_gcm_128, all zeros: nothing is sent under it."""
    return struct.pack("=HH36x", TLS_1_3, AES_GCM_128)


def ktls() -> Finding:
    """Kernel TLS in both directions on a loopback connection."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), SOCKET_DEADLINE) as near,
    ):
        try:
            near.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
            near.setsockopt(SOL_TLS, TLS_TX, _tls_key())
            near.setsockopt(SOL_TLS, TLS_RX, _tls_key())
        except OSError as error:
            return Finding(False, None, f"setsockopt: {say_errno(error.errno or 0)}")
    return Finding(True)


def _tcp_buffer(name: str) -> Finding:
    most = int(Path(f"/proc/sys/net/ipv4/{name}").read_text().split()[2])
    return Finding(most >= SOCKET_BUFFER, most, f"net.ipv4.{name}; {SOCKET_BUFFER} bytes or more will do")


def tcp_receive() -> Finding:
    """`value`: bytes that the receive buffer of a connection may grow to."""
    return _tcp_buffer("tcp_rmem")


def tcp_send() -> Finding:
    return _tcp_buffer("tcp_wmem")


def pidfd() -> Finding:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return Finding(False, None, f"pidfd_open: {say_errno(error.errno or 0)}")
    return Finding(True)


def peer_pidfd() -> Finding:
    near, far = socket.socketpair(socket.AF_UNIX)
    with near, far:
        try:
            os.close(near.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD))
        except OSError as error:
            return Finding(False, None, f"getsockopt: {say_errno(error.errno or 0)}")
    return Finding(True)


# Limits


def _limit(which: int, wanted: int) -> Finding:
    soft, hard = resource.getrlimit(which)
    known = {resource.RLIM_INFINITY: "unlimited"}
    why = f"the hard limit is {known.get(hard, hard)}; {wanted} or more will do"
    return Finding(soft == resource.RLIM_INFINITY or soft >= wanted, known.get(soft, soft), why)


def open_files() -> Finding:
    return _limit(resource.RLIMIT_NOFILE, OPEN_FILES)


def priority() -> Finding:
    """Whether a thread may go before others of the host, as those do that answer faults."""
    found: list[Finding] = []

    def attempt() -> None:
        try:
            os.setpriority(os.PRIO_PROCESS, 0, FIRST_NICE)
        except OSError as error:
            found.append(Finding(False, os.getpriority(os.PRIO_PROCESS, 0), say_errno(error.errno or 0)))
        else:
            found.append(Finding(True, FIRST_NICE, "nice value of a thread"))

    thread = threading.Thread(target=attempt)  # which ends with its priority
    thread.start()
    thread.join()
    return found[0]


def file_size() -> Finding:
    """A write beyond RLIMIT_FSIZE ends the process, memory file or not."""
    return _limit(resource.RLIMIT_FSIZE, SPARSE_MEMORY)


def sparse_memory() -> Finding:
    """Makes and maps an empty memfd of 1 TiB, and touches nothing."""
    fd = os.memfd_create("gmemd-probe", os.MFD_CLOEXEC)
    try:
        # Beyond RLIMIT_FSIZE this would be SIGXFSZ, which Python ignores, so that it is EFBIG.
        os.ftruncate(fd, SPARSE_MEMORY)
        mmap.mmap(fd, SPARSE_MEMORY).close()
    except OSError as error:
        return Finding(False, None, say_errno(error.errno or 0))
    finally:
        os.close(fd)
    return Finding(True, SPARSE_MEMORY)


def large_folios() -> Finding:
    """`value`: bytes that a write() of one page brings into a new memfd."""
    fd = os.memfd_create("gmemd-probe", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, LARGE_FOLIO)
        brought = os.fstat(fd).st_blksize
    finally:
        os.close(fd)
    return Finding(brought > mmap.PAGESIZE, brought, "bytes that one write() brings into a memfd")


def available_memory() -> Finding:
    """`value`: bytes that can be had without swapping."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    if found is None:
        return Finding(None, None, "/proc/meminfo does not say")
    return Finding(True, int(found[1]) << 10, "/proc/meminfo: MemAvailable")


def shared_memory() -> Finding:
    """`value`: free bytes in /dev/shm. A memfd does not count there."""
    found = os.statvfs("/dev/shm")
    free = found.f_bavail * found.f_frsize
    return Finding(free > 0, free, f"free of {found.f_blocks * found.f_frsize} bytes")


def _memory_cgroup() -> tuple[Path, str, str] | None:
    """Where the memory controller is mounted, our group below it, and the name of the file with its limit."""
    groups = [line.split(":", 2) for line in (PROC / "cgroup").read_text().splitlines()]
    v1 = [path for _, controllers, path in groups if "memory" in controllers.split(",")]
    v2 = [path for number, _, path in groups if number == "0"]
    for line in (PROC / "mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        mount = Path(before.split(" ")[4])
        if v1 and kind == "cgroup" and "memory" in options.split(","):
            return mount, v1[0], "memory.limit_in_bytes"
        if v2 and not v1 and kind == "cgroup2":
            return mount, v2[0], "memory.max"
    return None


def memory_cgroup() -> Finding:
    """`value`: the lowest limit in bytes of our memory cgroup and those above it, or "unlimited"."""
    found = _memory_cgroup()
    if found is None:
        return Finding(None, None, "no memory cgroup is mounted here")
    mount, group, name = found
    limits = []
    for path in (mount / group.lstrip("/"), *(mount / group.lstrip("/")).parents):
        with suppress(OSError, ValueError):
            limits.append(int((path / name).read_text()))
        if path == mount:
            break
    lowest = min(limits, default=NO_LIMIT)
    if lowest >= NO_LIMIT:
        return Finding(True, "unlimited", f"{name} of {group} and above")
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Finding(lowest >= whole, lowest, f"{name} of {group} or above; the host has {whole} bytes")


def huge_pages(size: int) -> Finding:
    """`value`: pages of `size` bytes that can be had: free ones of the pool, and those that it may grow by."""
    pool = HUGE_PAGES / f"hugepages-{size >> 10}kB"
    if not pool.is_dir():
        return Finding(False, 0, f"the kernel or the CPU has no pages of {size} bytes")
    free, reserved, growth, grown = (
        int((pool / name).read_text())
        for name in ("free_hugepages", "resv_hugepages", "nr_overcommit_hugepages", "surplus_hugepages")
    )
    can = free - reserved + growth - grown
    return Finding(can > 0, can, f"{free} free, {reserved} of them reserved, {growth} on demand")


def fd_store() -> Finding:
    """`value`: descriptors that the service manager keeps for us over a restart."""
    most = os.environ.get("FDSTORE")
    if most is not None:
        return Finding(most.isdecimal() and int(most) > 0, most, "$FDSTORE")
    if "NOTIFY_SOCKET" in os.environ:
        return Finding(None, None, "$NOTIFY_SOCKET is set, $FDSTORE is not: no store, or systemd before 254")
    if os.path.isdir("/run/systemd/system"):
        return Finding(None, None, "systemd runs, but has not started this process")
    return Finding(None, None, "systemd does not run here")


# What stands around the process


def seccomp() -> Finding:
    """`value`: the number of the mode. ok if no filter is in force."""
    mode = status_field("Seccomp")
    if not mode:
        return Finding(None, None, "/proc/self/status does not say")
    return Finding(mode == "0", int(mode), f"mode of seccomp; NoNewPrivs is {status_field('NoNewPrivs')}")


def security_module() -> Finding:
    """`value`: the label that AppArmor, SELinux or the like has put on this process."""
    for path in ("attr/apparmor/current", "attr/current"):
        try:
            label = (PROC / path).read_text().strip("\0\n ")
        except OSError:  # the file is there even where no module answers
            continue
        return Finding(label in CLEAR_OF_LSM or label.startswith("unconfined"), label, f"/proc/self/{path}")
    return Finding(True, None, "no security module labels processes")


def user_namespace() -> Finding:
    """ok if this is the host's."""
    mapping = " ".join((PROC / "uid_map").read_text().split())
    return Finding(mapping == "0 0 4294967295", mapping, "/proc/self/uid_map")


def container() -> Finding:
    """`value`: the kind, as far as it shows. ok if none shows."""
    kind = os.environ.get("container")  # noqa: SIM112 -- systemd's name for it
    with suppress(OSError):
        kind = kind or Path("/run/systemd/container").read_text().strip()
    for mark, name in (("/.dockerenv", "docker"), ("/run/.containerenv", "podman")):
        kind = kind or (name if os.path.exists(mark) else None)
    return Finding(kind is None, kind, "no sign of one" if kind is None else "its mark is there")


def syscall_rights() -> str:
    """What decides whether userfaultfd() may trap kernel-mode faults."""
    ptrace = 1 << 19  # CAP_SYS_PTRACE
    has = "has" if int(status_field("CapEff") or "0", 16) & ptrace else "lacks"
    try:
        switch = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip()
    except OSError as error:
        switch = f"unreadable, {say_errno(error.errno or 0)}"
    return f"vm.unprivileged_userfaultfd is {switch}, the process {has} CAP_SYS_PTRACE"
