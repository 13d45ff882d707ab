"""What is damaged on its way must be found, by the guest or by the host's own check, with address and values."""

from __future__ import annotations

import mmap
import struct
from typing import TYPE_CHECKING

import pytest
from vmm_play import EX_DATAERR, PAGE, Event, Guest, Layout, Sockets, Vmm, content

if TYPE_CHECKING:
    from collections.abc import Callable

pytest_plugins = ["vmm_fixtures"]


class Damage:
    """A guest with one region whose memory is at the destination, before it runs, for a test to spoil."""

    def __init__(self, start: Callable[..., Vmm], sockets: Sockets, guest: str) -> None:
        # Sequential: so we know which page a vCPU may be in the middle of.
        self.moved = Guest(start, sockets, "--memory", "8M", "--guest", guest, workload=["--pattern", "sequential"])
        self.moved.pause(least_steps=(8 << 20) // PAGE)  # each page that it owns once
        self.moved.copy()
        self.memory = self.moved.memory()
        self.layout = Layout(self.memory)

    def page(self, version: int) -> int:
        """A page that has this version at least, and that nobody is writing."""
        owned = self.layout.data_pages - self.layout.shared_pages
        current = self.moved.paused["steps"][0] % owned
        for index in range(owned):
            page = self.layout.shared_pages + index
            if index != current and self.version(page) >= version:
                assert self.read(page) == content(self.layout.seed, page, self.version(page))
                return page
        raise AssertionError("there is no such page")

    def version(self, page: int) -> int:
        return int(struct.unpack_from("<I", self.memory, self.layout.ledger + 4 * page)[0])

    def address(self, page: int) -> int:
        return self.layout.data + page * PAGE

    def read(self, page: int) -> bytes:
        return self.memory[self.address(page) : self.address(page) + PAGE]

    def write(self, page: int, data: bytes) -> None:
        self.memory[self.address(page) : self.address(page) + PAGE] = data

    def flip(self, address: int) -> None:
        self.memory[address] ^= 0x10

    def outcome(self) -> tuple[list[Event], Event]:
        """Runs the guest to its end: the mismatches that it found, and the event "verified"."""
        self.memory.close()
        destination = self.moved.destination
        self.moved.ready()
        self.moved.daemon.send({"done": True, "pages": 0})
        events = [destination.event()]
        while events[-1]["event"] != "done":
            events.append(destination.event())
        destination.command("verify", *self.moved.paused["memory"])
        while events[-1]["event"] != "verified":
            events.append(destination.event())
        assert events[-1]["ok"] is False
        assert events[-1]["pages_verified"] < events[-1]["pages"]
        assert destination.end() == EX_DATAERR
        return [event for event in events if event["event"] == "mismatch"], events[-1]


def word(data: bytes, offset: int) -> str:
    return f"0x{struct.unpack_from('<Q', data, offset & -8)[0]:016x}"


@pytest.fixture
def damage(start: Callable[..., Vmm], sockets: Sockets, guest: str) -> Damage:
    return Damage(start, sockets, guest)


def assert_found(damage: Damage, page: int, right: bytes, wrong: bytes) -> None:
    """The guest stopped at that page and said where; the host found the same and nothing else."""
    offset = next(i for i in range(0, PAGE, 8) if right[i : i + 8] != wrong[i : i + 8])
    where = {
        "address": damage.address(page) + offset,
        "expected": word(right, offset),
        "found": word(wrong, offset),
    }
    (mismatch,), verified = damage.outcome()
    assert where.items() <= mismatch.items()
    assert mismatch["page"] == page
    assert verified["first_wrong"] == where
    assert verified["mismatches"] == 1


def test_a_flipped_byte_is_found(damage: Damage) -> None:
    page = damage.page(2)
    right = damage.read(page)
    damage.flip(damage.address(page) + 3001)
    assert_found(damage, page, right, damage.read(page))


def test_a_flipped_byte_in_a_shared_page_is_found(damage: Damage) -> None:
    page = next(page for page in range(damage.layout.shared_pages) if damage.version(page))
    right = damage.read(page)
    damage.flip(damage.address(page))
    assert_found(damage, page, right, damage.read(page))


def test_a_stale_page_is_found(damage: Damage) -> None:
    page = damage.page(2)
    right = damage.read(page)
    damage.write(page, content(damage.layout.seed, page, damage.version(page) - 1))
    assert_found(damage, page, right, damage.read(page))


def test_zeros_in_place_of_a_page_are_found(damage: Damage) -> None:
    page = damage.page(1)
    right = damage.read(page)
    damage.write(page, bytes(PAGE))
    assert_found(damage, page, right, bytes(PAGE))


def test_the_page_of_another_address_is_found(damage: Damage) -> None:
    page = damage.page(2)
    right = damage.read(page)
    damage.write(page, content(damage.layout.seed, page + 1, damage.version(page)))
    assert_found(damage, page, right, damage.read(page))


def test_what_deceives_the_guest_does_not_deceive_the_host(damage: Damage) -> None:
    """A page and its entry in the ledger, both of an earlier time: consistent, and wrong."""
    page = damage.page(2)
    stale = damage.version(page) - 1
    damage.write(page, content(damage.layout.seed, page, stale))
    struct.pack_into("<I", damage.memory, damage.layout.ledger + 4 * page, stale)
    mismatches, verified = damage.outcome()
    assert mismatches == []
    assert verified["mismatches"] >= 2


@pytest.mark.parametrize("part", ["unused", "params", "stacks", "program", "tables", "ledger"])
def test_a_flipped_byte_in_the_low_area_is_found(damage: Damage, part: str) -> None:
    layout = damage.layout
    address = {
        "unused": 9,
        "params": 2 * PAGE - 1,
        "stacks": layout.stacks + 100,
        "program": layout.tables - 1,
        "tables": layout.tables + 8 * 100,  # an entry for addresses that there are not
        "ledger": layout.ledger + 4 * layout.data_pages,
    }[part]
    damage.flip(address)
    mismatches, verified = damage.outcome()
    assert mismatches == []
    assert verified["first_wrong"]["address"] == address & -8
    assert verified["mismatches"] == 1
    assert verified["pages_verified"] == verified["pages"] - 1


def test_memory_is_compared_with_the_sources(damage: Damage) -> None:
    layout = damage.layout
    page = next(page for page in range(layout.shared_pages) if damage.version(page))
    with mmap.mmap(damage.moved.since[0], 8 << 20) as source:
        source[damage.address(page) + 8] ^= 1
    damage.memory.close()
    damage.moved.ready()
    damage.moved.destination.expect("ready")
    damage.moved.destination.expect("first-instruction")
    damage.moved.done()
    verified = damage.moved.verify()
    assert verified["mismatches"] == 1
    assert verified["pages_verified"] == verified["pages"]
    assert verified["first_wrong"]["address"] == damage.address(page) + 8
    assert damage.moved.destination.end() == EX_DATAERR
