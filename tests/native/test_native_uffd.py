"""The userfaultfd wrapper against the kernel: both kinds of fault, and CONTINUE that goes only a part of the way."""

import errno
import fcntl
import mmap
import os
import select
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass

import pytest
from native_rig import (
    EVENT_FAULT,
    EVENT_REMOVE,
    FAULT_MINOR,
    FEATURE_REMOVE,
    FEATURE_THREAD_ID,
    HUGE,
    PAGE,
    PATIENCE,
    Guest,
    Task,
    content,
    huge_pages,
    until,
)

from gmemd.errors import HandoffError, KernelError
from gmemd.native import check, ffi, lib

UFFDIO_REGISTER, MISSING, MINOR = 0xC020AA00, 1, 4
UFFDIO_CONTINUE, DONTWAKE = 0xC020AA07, 1
MESSAGE = struct.Struct("<B7xQQQ")  # event; flags, address, thread of a fault; start and end of a removal


@dataclass(frozen=True, slots=True)
class Message:
    event: int
    flags: int
    address: int
    thread: int


def messages(uffd: int, most: int = 64) -> list[Message]:
    """What one read returns."""
    out = ffi.new("unsigned char[]", most * MESSAGE.size)
    count = lib.gm_uffd_read(uffd, out, most)
    assert count >= 0, os.strerror(-count)
    return [Message(*fields) for fields in MESSAGE.iter_unpack(bytes(ffi.buffer(out))[: count * MESSAGE.size])]


def next_messages(uffd: int, count: int) -> list[Message]:
    """So many of them, waited for."""
    found: list[Message] = []
    while len(found) < count:
        assert select.select([uffd], [], [], PATIENCE)[0], "no message comes"
        found += messages(uffd)
    return found


def resume(guest: Guest, first: int, count: int = 1, region: int = 0) -> tuple[int, int]:
    """CONTINUE of some pages: 0 or the errno, and the pages done."""
    size = guest.shapes[region][1]
    done = ffi.new("uint64_t *")
    result = lib.gm_uffd_continue(guest.uffds[0], guest.hva(first, region), count * size, size, done)
    return -result, done[0] // size


def fill(guest: Guest, *pages: int) -> None:
    for page in pages:
        os.pwrite(guest.files[0], content(page), page * PAGE)


def test_opens_non_blocking_and_ready() -> None:
    """A descriptor without the API handshake would poll as an error, and a blocking one would block."""
    uffd = check(lib.gm_uffd_open, 0)
    try:
        assert not os.get_blocking(uffd)
        assert not os.get_inheritable(uffd)
        assert messages(uffd) == []
    finally:
        os.close(uffd)


def test_unknown_features_are_named() -> None:
    with pytest.raises(KernelError, match="features 0x8000000000000000") as caught:
        check(lib.gm_uffd_open, 1 << 63)
    assert caught.value.errno == errno.EINVAL


def test_both_kinds_of_fault_are_told_and_answered() -> None:
    """An absent page is MISSING, one in the page cache is MINOR; the same CONTINUE answers both."""
    with Guest() as guest:
        fill(guest, 3)
        minor, missing = Task(guest.read, 3), Task(guest.read, 4)
        faults = {found.address: found for found in next_messages(guest.uffds[0], 2)}
        assert {found.event for found in faults.values()} == {EVENT_FAULT}
        assert faults[guest.hva(3)].flags & FAULT_MINOR
        assert not faults[guest.hva(4)].flags & FAULT_MINOR
        fill(guest, 4)
        assert resume(guest, 3) == (0, 1)
        assert resume(guest, 4) == (0, 1)
        assert minor.result() == content(3)
        assert missing.result() == content(4)


def test_registers_for_what_the_mapping_takes() -> None:
    with Guest(register=False) as guest:
        modes = check(lib.gm_uffd_register, guest.uffds[0], guest.hva(0), 64 * PAGE)
        assert modes == lib.GM_UFFD_MISSING | lib.GM_UFFD_MINOR


def test_what_cannot_be_registered_is_named() -> None:
    """Private memory takes no minor faults; an address that is not mapped is the VMM's mistake, too."""
    with Guest(register=False) as guest, mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as private:
        with ffi.from_buffer(private) as held:
            address = int(ffi.cast("uintptr_t", held))
        with pytest.raises(KernelError, match=f"cannot register 0x1000 bytes at {address:#x}"):
            check(lib.gm_uffd_register, guest.uffds[0], address, PAGE)
        with pytest.raises((KernelError, HandoffError), match="cannot register 0x1000 bytes at 0x10000"):
            check(lib.gm_uffd_register, guest.uffds[0], 0x10000, PAGE)


def test_a_mapped_page_in_a_run_is_passed_over() -> None:
    """EEXIST in the middle: what comes before is mapped, and so is what comes after."""
    with Guest() as guest:
        fill(guest, *range(8))
        assert resume(guest, 3) == (0, 1)
        assert resume(guest, 0, 8) == (0, 8)
        for page in range(8):
            assert guest.read(page) == content(page)
        assert messages(guest.uffds[0]) == [], "nobody had to wait"


def test_who_waits_for_a_mapped_page_is_woken() -> None:
    """A message that we hold, for a page that somebody else mapped without waking: EEXIST must wake the thread."""
    with Guest() as guest:
        reader = Task(guest.read, 3)
        next_messages(guest.uffds[0], 1)
        fill(guest, 3)
        quiet_continue(guest, 3)
        assert reader.is_alive()
        assert resume(guest, 3) == (0, 1)
        assert reader.result() == content(3)


def quiet_continue(guest: Guest, page: int) -> None:
    """UFFDIO_CONTINUE with DONTWAKE: it maps, and leaves who waits asleep."""
    request = bytearray(struct.pack("<QQQq", guest.hva(page), PAGE, DONTWAKE, 0))
    fcntl.ioctl(guest.uffds[0], UFFDIO_CONTINUE, request)


@pytest.mark.parametrize("absent", [0, 5, 7])
def test_an_absent_page_ends_a_run(absent: int) -> None:
    """EFAULT says where: the pages before it are mapped."""
    with Guest() as guest:
        fill(guest, *(page for page in range(8) if page != absent))
        assert resume(guest, 0, 8) == (errno.EFAULT, absent)
        for page in range(absent):
            assert guest.read(page) == content(page)
        fill(guest, absent)
        assert resume(guest, absent, 8 - absent) == (0, 8 - absent)


def test_an_absent_page_after_a_mapped_one() -> None:
    """EEXIST, go on, EFAULT: all three in one call."""
    with Guest() as guest:
        fill(guest, 0, 1, 2, 4)
        assert resume(guest, 1) == (0, 1)
        assert resume(guest, 0, 5) == (errno.EFAULT, 3)


def test_an_unread_removal_holds_continue_up() -> None:
    """EAGAIN while a REMOVE event waits; once it is read, the same CONTINUE works."""
    with Guest(features=FEATURE_REMOVE) as guest:
        fill(guest, 0, 1, 9)
        balloon = Task(guest.remove, 9)
        until(lambda: resume(guest, 0)[0] == errno.EAGAIN)
        assert resume(guest, 0, 2) == (errno.EAGAIN, 0)
        [removal] = next_messages(guest.uffds[0], 1)
        assert (removal.event, removal.flags, removal.address) == (EVENT_REMOVE, guest.hva(9), guest.hva(10))
        balloon.result()
        assert resume(guest, 0, 2) == (0, 2)
        assert not guest.present(9)


def test_an_unmapped_range_is_told() -> None:
    with Guest() as guest:
        done = ffi.new("uint64_t *")
        result = lib.gm_uffd_continue(guest.uffds[0], 0x10000, PAGE, PAGE, done)
        assert (-result, done[0]) == (errno.ENOENT, 0)


DYING = """
import mmap, socket, sys
from gmemd.native import check, ffi, lib
memory = mmap.mmap(int(sys.argv[1]), {size}, mmap.MAP_SHARED)
uffd = check(lib.gm_uffd_open, 0)
address = int(ffi.cast("uintptr_t", ffi.from_buffer(memory)))
check(lib.gm_uffd_register, uffd, address, {size})
socket.send_fds(socket.socket(fileno=int(sys.argv[2])), [str(address).encode()], [uffd])
"""


def test_a_dead_process_is_told() -> None:
    """ESRCH: the descriptor outlives its process, the memory does not."""
    with Guest(register=False) as guest:
        fill(guest, 0)
        ours, its = socket.socketpair()
        with ours, its:
            program = DYING.format(size=64 * PAGE)
            passed = (guest.files[0], its.fileno())
            subprocess.run([sys.executable, "-c", program, *map(str, passed)], pass_fds=passed, check=True)
            text, [uffd], _, _ = socket.recv_fds(ours, 64, 1)
        try:
            done = ffi.new("uint64_t *")
            assert lib.gm_uffd_continue(uffd, int(text), PAGE, PAGE, done) == -errno.ESRCH
            assert lib.gm_uffd_wake(uffd, int(text), PAGE) == 0
            assert messages(uffd) == []
        finally:
            os.close(uffd)


def test_many_messages_a_read() -> None:
    """All that wait come at once, as far as there is room; one for each thread, also on the same page."""
    with Guest(features=FEATURE_THREAD_ID) as guest:
        readers = [Task(guest.read, page) for page in [*range(10), 3, 3]]
        until(lambda: guest.unread_faults() == len(readers))
        assert len(messages(guest.uffds[0], 5)) == 5
        found = messages(guest.uffds[0], 64)
        assert len(found) == len(readers) - 5
        assert {message.thread for message in found} <= {reader.native_id for reader in readers}
        fill(guest, *range(10))
        assert resume(guest, 0, 10) == (0, 10)
        for reader in readers:
            reader.result()


def test_wake_makes_a_thread_fault_again() -> None:
    """The reader of a message died before it answered: WAKE brings the message back."""
    with Guest() as guest:
        reader = Task(guest.read, 1)
        next_messages(guest.uffds[0], 1)
        assert lib.gm_uffd_wake(guest.uffds[0], guest.hva(0), 64 * PAGE) == 0
        [again] = next_messages(guest.uffds[0], 1)
        assert again.address == guest.hva(1)
        fill(guest, 1)
        assert resume(guest, 1) == (0, 1)
        assert reader.result() == content(1)


def test_copy_and_zero() -> None:
    """The two other ways to answer, for mappings that take no CONTINUE; neither harms a page that is there."""
    with Guest() as guest:
        copied, zeroed = Task(guest.read, 1), Task(guest.read, 2)
        next_messages(guest.uffds[0], 2)
        assert lib.gm_uffd_copy(guest.uffds[0], guest.hva(1), content(1), PAGE) == 0
        assert lib.gm_uffd_zero(guest.uffds[0], guest.hva(2), PAGE) == 0
        assert copied.result() == content(1)
        assert zeroed.result() == bytes(PAGE)
        assert lib.gm_uffd_copy(guest.uffds[0], guest.hva(1), content(9), PAGE) == -errno.EEXIST
        assert guest.read(1) == content(1)


def test_unregistered_memory_traps_no_more() -> None:
    with Guest() as guest:
        assert lib.gm_uffd_unregister(guest.uffds[0], guest.hva(0), 64 * PAGE) == 0
        assert guest.read(1) == bytes(PAGE)
        assert messages(guest.uffds[0]) == []


@pytest.mark.parametrize("modes", [MISSING | MINOR, MINOR])
def test_who_waits_when_it_is_unregistered_goes_on(modes: int) -> None:
    """Also where the kernel traps minor faults alone, and wakes nobody by itself."""
    with Guest(register=False) as guest:
        fcntl.ioctl(guest.uffds[0], UFFDIO_REGISTER, struct.pack("<4Q", guest.hva(0), 64 * PAGE, modes, 0))
        fill(guest, 3)
        reader = Task(guest.read, 3)
        until(lambda: guest.unread_faults() == 1)
        guest.memory.unregister()
        assert reader.result() == content(3)


def test_a_removal_that_nobody_has_read_when_it_is_unregistered() -> None:
    """Nobody may ever read the userfaultfd again, and the VMM's copy stays open: its thread must not wait for that."""
    with Guest((64, PAGE), (64, PAGE), features=FEATURE_REMOVE) as guest:
        fill(guest, 0, 9)
        balloons = [Task(guest.remove, 9), Task(guest.remove, 5, 1, 1)]
        until(lambda: resume(guest, 0)[0] == errno.EAGAIN)
        until(guest.memory.unregister)
        for balloon in balloons:
            balloon.result()
        assert not guest.present(9)


def test_a_huge_page_is_continued_as_a_whole() -> None:
    """One message, one CONTINUE for 2 MiB; runs with a mapped page inside as with small pages."""
    with huge_pages(3), Guest((3, HUGE)) as guest:
        reader = Task(guest.read, 1)
        [fault] = next_messages(guest.uffds[0], 1)
        assert fault.address == guest.hva(1)
        with mmap.mmap(guest.files[0], 3 * HUGE, mmap.MAP_SHARED) as alias:
            for page in range(3):
                alias[page * HUGE : (page + 1) * HUGE] = content(page, size=HUGE)
            assert resume(guest, 1) == (0, 1)
            assert reader.result() == content(1, size=HUGE)
            assert resume(guest, 0, 3) == (0, 3)
