"""What a migration would do on this host, for each kind of guest memory: found by trying, never by version.

`memfd()`, `hugetlb()`, `guest_memfd()` and so on try what they need. `ability()` judges from findings that are there
already, as `gmemd doctor` has them. Whatever can be asked of a host one by one stands in `CHECKS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from gmemd.probe_kernel import Finding, Memory
from gmemd.probe_table import CHECKS, Check

__all__ = [
    "BACKINGS",
    "CHECKS",
    "Ability",
    "Backing",
    "Check",
    "Finding",
    "Memory",
    "ability",
    "guest_memfd",
    "guest_memfd_no_direct_map",
    "guest_memfd_userfault",
    "hugetlb",
    "memfd",
]

Find = Callable[[str], Finding]
POPULATE = ("write", "recv", "copy")  # best first


@dataclass(frozen=True, slots=True)
class Ability:
    """What a migration onto one backing would do here.

    `trap`: "minor" or "missing+minor", None if faults are not trapped. `populate`: the ways to fill a page that
    work, best first. `ok` is None where it could not be tried. `why`: what stands in the way, "" if nothing does.
    """

    ok: bool | None
    trap: str | None
    populate: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Backing:
    """A way for guest memory to lie in a file, and what must work for vCPUs to run on it, where that is not sure."""

    memory: Memory
    vcpus: tuple[str, ...]


BACKINGS = {
    "memfd": Backing(Memory.MEMFD, ()),
    "hugetlb": Backing(Memory.HUGETLB, ()),
    "guest_memfd": Backing(Memory.GUEST_MEMFD, ("guest_memfd.pin",)),
    "guest_memfd_userfault": Backing(Memory.GUEST_MEMFD, ("kvm.guest_memfd_slot", "kvm.userfault")),
    "guest_memfd_no_direct_map": Backing(Memory.NO_DIRECT_MAP, ("kvm.no_direct_map", "kvm.userfault")),
}


def _trap(memory: Memory, find: Find) -> tuple[str | None, Finding]:
    """The trap mode, and the finding that decided: both where they go together, else MINOR if it stops at all pages."""
    both = find(f"{memory}.missing_minor")
    if both.ok:
        return "missing+minor", both
    alone = [find(f"{memory}.{what}") for what in ("minor", "absent_in_minor")]
    return ("minor", alone[0]) if all(found.ok for found in alone) else (None, both)


def _populate(memory: Memory, find: Find) -> tuple[tuple[str, ...], Finding]:
    """The ways that work, and the finding that decided."""
    found = {way: find(f"{memory}.populate_{way}") for way in POPULATE}
    ways = tuple(way for way in POPULATE if found[way].ok)
    return ways, found[ways[0] if ways else POPULATE[-1]]


def ability(backing: str, find: Find) -> Ability:
    """Judges one of BACKINGS from what `find` says of the checks that it is asked for by name."""
    plan = BACKINGS[backing]
    trap, trapped = _trap(plan.memory, find)
    populate, populated = _populate(plan.memory, find)
    decisive = {name: find(name) for name in ("userfaultfd.access", *plan.vcpus)}
    decisive |= {"faults": trapped, "populating": populated}
    for ok in (False, None):
        for what, found in decisive.items():
            if found.ok is ok:
                return Ability(ok, trap, populate, f"{what}: {found.why}")
    return Ability(True, trap, populate, "")


def _by_trying(name: str) -> Finding:
    return CHECKS[name].try_it()


def memfd() -> Ability:
    """Guest memory in a memfd or a tmpfs file."""
    return ability("memfd", _by_trying)


def hugetlb() -> Ability:
    """Guest memory in a hugetlb memfd of 2 MiB pages."""
    return ability("hugetlb", _by_trying)


def guest_memfd() -> Ability:
    """Guest memory in a guest_memfd, the mapping of which is a plain slot."""
    return ability("guest_memfd", _by_trying)


def guest_memfd_userfault() -> Ability:
    """Guest memory in a guest_memfd that is the slot itself, with KVM userfault; the VMM's faults are userfaultfd's."""
    return ability("guest_memfd_userfault", _by_trying)


def guest_memfd_no_direct_map() -> Ability:
    """The same, out of the kernel's direct map."""
    return ability("guest_memfd_no_direct_map", _by_trying)
