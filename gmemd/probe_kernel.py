"""What the kernel lets this process do with userfaultfd, memory files and KVM: the native trials, typed.

Each call tries one thing on a page of its own, takes microseconds to milliseconds (seconds at most, where a fault
gets lost), leaves nothing behind and raises nothing.
"""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from gmemd.native import ffi, lib

Value = int | str | list[str] | None

# The bits of struct uffdio_api.features, from the lowest.
FEATURES = (
    "pagefault_flag_wp",
    "event_fork",
    "event_remap",
    "event_remove",
    "missing_hugetlbfs",
    "missing_shmem",
    "event_unmap",
    "sigbus",
    "thread_id",
    "minor_hugetlbfs",
    "minor_shmem",
    "exact_address",
    "wp_hugetlbfs_shmem",
    "wp_unpopulated",
    "poison",
    "wp_async",
    "move",
)
# The flags of KVM_CREATE_GUEST_MEMFD, from the lowest.
GUEST_MEMFD_FLAGS = ("mmap", "init_shared", "no_direct_map", "write")
MMAP, INIT_SHARED, NO_DIRECT_MAP = 1 << 0, 1 << 1, 1 << 2
CLOCK_LIMIT = 1000  # nanoseconds: answering a fault takes some 30 µs, and reads the clock a few times
# How `enum gm_probe_seen` reads.
SEEN = ("nothing", "minor", "missing", "content", "zero", "other", "refused")
LET_THROUGH = {
    "nothing": "neither trapped nor ended in time",
    "content": "not trapped: the page's content was read",
    "zero": "not trapped: zeros were read",
    "other": "not trapped: something else was read",
}


class Memory(StrEnum):
    """A kind of memory file."""

    MEMFD = "memfd"
    HUGETLB = "hugetlb"
    GUEST_MEMFD = "guest_memfd"
    NO_DIRECT_MAP = "guest_memfd_no_direct_map"


NATIVE = {
    Memory.MEMFD: lib.GM_PROBE_MEMFD,
    Memory.HUGETLB: lib.GM_PROBE_HUGETLB,
    Memory.GUEST_MEMFD: lib.GM_PROBE_GUEST_MEMFD,
    Memory.NO_DIRECT_MAP: lib.GM_PROBE_NO_DIRECT_MAP,
}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found. `ok` is None where it could not be tried; `why` is what was seen."""

    ok: bool | None
    value: Value = None
    why: str = "it worked"


def say_errno(code: int) -> str:
    """`ENOENT (No such file or directory)`; empty for 0."""
    # Python knows the number by its other name, which the kernel's documentation never uses.
    name = "EOPNOTSUPP" if code == errno.EOPNOTSUPP else errno.errorcode.get(code, str(code))
    return f"{name} ({os.strerror(code)})" if code else ""


def _try(call: Callable[..., Any], *arguments: int) -> tuple[Finding, int]:
    """Runs a native trial; its finding without a value, and the value."""
    trial = call(*arguments)
    ok = None if trial.ok < 0 else bool(trial.ok)
    if ok:
        return Finding(True), trial.value
    parts = (ffi.string(trial.step).decode(), say_errno(trial.error))
    return Finding(ok, None, ": ".join(filter(None, parts))), trial.value


def _names(bits: int, names: tuple[str, ...]) -> list[str]:
    return [names[i] if i < len(names) else f"bit_{i}" for i in range(bits.bit_length()) if bits >> i & 1]


# userfaultfd


def _open(way: int, name: str) -> Finding:
    finding, _ = _try(lib.gm_probe_uffd_open, way)
    return replace(finding, value=name if finding.ok else None)


def uffd_device() -> Finding:
    return _open(lib.GM_PROBE_DEVICE, "/dev/userfaultfd")


def uffd_syscall() -> Finding:
    return _open(lib.GM_PROBE_SYSCALL, "userfaultfd()")


def uffd_user_mode() -> Finding:
    return _open(lib.GM_PROBE_USER_MODE_ONLY, "userfaultfd(UFFD_USER_MODE_ONLY)")


def uffd_features() -> Finding:
    """`value`: the names of the features."""
    finding, bits = _try(lib.gm_probe_uffd_features)
    return replace(finding, value=_names(bits, FEATURES)) if finding.ok else finding


def uffd_move() -> Finding:
    """On anonymous memory, the only kind that moves."""
    return _resolve(lib.GM_PROBE_ANONYMOUS, lib.GM_PROBE_MOVE)


def _trap(memory: Memory, modes: int, *, present: bool) -> Finding:
    """`value`: how the kernel's own touch of the page was trapped, or what it saw (SEEN)."""
    finding, seen = _try(lib.gm_probe_trap, NATIVE[memory], modes, int(present))
    why = LET_THROUGH.get(SEEN[seen], finding.why) if finding.ok is False and seen else finding.why
    return replace(finding, value=SEEN[seen] if seen else None, why=why)


def missing(memory: Memory) -> Finding:
    """Registered for MISSING: is an absent page trapped, and let go with its content?"""
    return _trap(memory, lib.GM_PROBE_MISSING, present=False)


def minor(memory: Memory) -> Finding:
    """Registered for MINOR: is a page that is present but not mapped trapped, and let go with its content?"""
    return _trap(memory, lib.GM_PROBE_MINOR, present=True)


def missing_minor(memory: Memory) -> Finding:
    """Registered for both: are absent and present pages trapped? `value`: as what, in that order."""
    absent = _trap(memory, lib.GM_PROBE_MISSING | lib.GM_PROBE_MINOR, present=False)
    if not absent.ok:
        return replace(absent, why=f"absent page: {absent.why}")
    present = _trap(memory, lib.GM_PROBE_MISSING | lib.GM_PROBE_MINOR, present=True)
    if not present.ok:
        return replace(present, why=f"present page: {present.why}")
    return Finding(True, [str(absent.value), str(present.value)])


def absent_in_minor(memory: Memory) -> Finding:
    """Registered for MINOR alone: what becomes of an absent page? `value`: minor, missing, zero …"""
    return _trap(memory, lib.GM_PROBE_MINOR, present=False)


def _resolve(native: int, how: int) -> Finding:
    return _try(lib.gm_probe_resolve, native, how)[0]


def uffd_continue(memory: Memory) -> Finding:
    return _resolve(NATIVE[memory], lib.GM_PROBE_CONTINUE)


def uffd_copy(memory: Memory) -> Finding:
    return _resolve(NATIVE[memory], lib.GM_PROBE_COPY)


def uffd_zeropage(memory: Memory) -> Finding:
    return _resolve(NATIVE[memory], lib.GM_PROBE_ZEROPAGE)


def uffd_poison(memory: Memory) -> Finding:
    return _resolve(NATIVE[memory], lib.GM_PROBE_POISON)


def uffd_wake(memory: Memory) -> Finding:
    """Does a fault whose message was read and not answered come again after UFFDIO_WAKE?"""
    return _try(lib.gm_probe_wake, NATIVE[memory])[0]


def uffd_thread_id(memory: Memory) -> Finding:
    return _try(lib.gm_probe_thread_id, NATIVE[memory])[0]


def uffd_event_remove(memory: Memory) -> Finding:
    """Does MADV_REMOVE tell the userfaultfd?"""
    return _try(lib.gm_probe_event_remove, NATIVE[memory])[0]


# Memory files


def by_write(memory: Memory) -> Finding:
    """pwrite() of a whole page. `value`: "once" where a second write to the page is refused, else "again"."""
    finding, again = _try(lib.gm_probe_populate, NATIVE[memory], lib.GM_PROBE_BY_WRITE)
    if not finding.ok:
        return finding
    why = f"it worked; a second write: {say_errno(again)}" if again else finding.why
    return replace(finding, value="once" if again else "again", why=why)


def by_recv(memory: Memory) -> Finding:
    return _try(lib.gm_probe_populate, NATIVE[memory], lib.GM_PROBE_BY_RECV)[0]


def by_copy(memory: Memory) -> Finding:
    return _try(lib.gm_probe_populate, NATIVE[memory], lib.GM_PROBE_BY_COPY)[0]


def by_madvise(memory: Memory) -> Finding:
    return _try(lib.gm_probe_populate, NATIVE[memory], lib.GM_PROBE_BY_MADVISE)[0]


def pin(memory: Memory) -> Finding:
    """Can the kernel take a reference to the mapped page (GUP), as KVM does with a plain slot?"""
    return _try(lib.gm_probe_pin, NATIVE[memory])[0]


# KVM


def kvm() -> Finding:
    """`value`: the API version, which is 12."""
    finding, version = _try(lib.gm_probe_kvm)
    return replace(finding, value=version or None)


def kvm_vm() -> Finding:
    return _try(lib.gm_probe_kvm_vm)[0]


def guest_memfd() -> Finding:
    return _try(lib.gm_probe_guest_memfd, 0)[0]


def guest_memfd_flags() -> Finding:
    """`value`: those flags that a guest_memfd can be made with. ok if MMAP and INIT_SHARED are among them."""
    plain = guest_memfd()
    if not plain.ok:
        return replace(plain, ok=None)
    each = (1 << i for i in range(len(GUEST_MEMFD_FLAGS)))
    accepted = sum(flag for flag in each if _try(lib.gm_probe_guest_memfd, flag)[0].ok)
    refused = _names((MMAP | INIT_SHARED) & ~accepted, GUEST_MEMFD_FLAGS)
    why = f"refused: {', '.join(refused)}" if refused else "it worked"
    return Finding(not refused, _names(accepted, GUEST_MEMFD_FLAGS), why)


def no_direct_map() -> Finding:
    """A guest_memfd out of the kernel's direct map that can be mapped all the same."""
    return _try(lib.gm_probe_guest_memfd, MMAP | INIT_SHARED | NO_DIRECT_MAP)[0]


def slot(memory: Memory) -> Finding:
    """A plain slot: KVM is given the mapping."""
    return _try(lib.gm_probe_slot, NATIVE[memory], 0)[0]


def guest_memfd_slot() -> Finding:
    """A slot of KVM_MEM_GUEST_MEMFD: KVM is given the file, too."""
    return _try(lib.gm_probe_slot, lib.GM_PROBE_GUEST_MEMFD, 1)[0]


def kvm_userfault() -> Finding:
    """A guest_memfd slot with a userfault bitmap: the flag must be taken, a bitmap that lies nowhere refused."""
    return _try(lib.gm_probe_kvm_userfault)[0]


def pre_fault() -> Finding:
    return _try(lib.gm_probe_prefault)[0]


# The CPU


def clock() -> Finding:
    """`value`: nanoseconds that a reading of the monotonic clock takes. ok if it needs no system call."""
    finding, nanoseconds = _try(lib.gm_probe_clock)
    if not finding.ok:
        return finding
    return Finding(nanoseconds <= CLOCK_LIMIT, nanoseconds, f"nanoseconds a reading; {CLOCK_LIMIT} or less will do")


def crc32c() -> Finding:
    return _try(lib.gm_probe_crc32c)[0]
