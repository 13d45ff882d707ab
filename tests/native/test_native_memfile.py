"""Memory files: recognised, asked for holes, and copied to and from though somebody truncates them."""

import errno
import mmap
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from native_inside import ffi as inside_ffi
from native_inside import inside
from native_rig import HUGE, PAGE, address_of, content, huge_pages, large_file, new_file

from gmemd.errors import HandoffError, KernelError
from gmemd.native import check, ffi, lib

MANY_PAGES = 64 << 20  # bytes, more than are made present in a millisecond


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = new_file(16, PAGE)
    yield fd
    os.close(fd)


def kind(fd: int) -> tuple[int, int]:
    page_size = ffi.new("uint64_t *")
    return check(lib.gm_memfile_kind, fd, page_size), page_size[0]


def test_a_memfd_is_shared_memory(memfd: int) -> None:
    assert kind(memfd) == (lib.GM_SHMEM, PAGE)
    assert not os.get_inheritable(memfd)


def test_a_hugetlb_memfd_tells_its_page_size() -> None:
    with huge_pages(1):
        fd = new_file(1, HUGE)
        try:
            assert kind(fd) == (lib.GM_HUGETLB, HUGE)
            assert lib.gm_memfile_empty(fd, 0, HUGE) == 1
            with mmap.mmap(fd, HUGE, mmap.MAP_SHARED) as mapped:
                mapped[0] = 1
            assert lib.gm_memfile_empty(fd, 0, HUGE) == 0
        finally:
            os.close(fd)


def test_a_file_on_a_disk_is_one(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(PAGE))
    with path.open("rb") as file:
        found = kind(file.fileno())[0]
    system = subprocess.check_output(["stat", "--file-system", "--format=%T", tmp_path], text=True).strip()
    assert found == (lib.GM_SHMEM if system == "tmpfs" else lib.GM_FILE)


@pytest.mark.usefixtures("require_kvm")
def test_guest_memfd_is_recognised() -> None:
    try:
        fd = check(lib.gm_memfile_guest_memfd, 16 * PAGE, lib.GM_GUEST_MEMFD_MMAP | lib.GM_GUEST_MEMFD_INIT_SHARED)
    except KernelError as error:
        pytest.skip(str(error))
    try:
        assert kind(fd)[0] == lib.GM_GUEST_MEMFD
        assert not os.get_inheritable(fd)
        assert lib.gm_memfile_empty(fd, 0, 16 * PAGE) == 1
        with mmap.mmap(fd, 16 * PAGE, mmap.MAP_SHARED) as mapped:
            mapped[7 * PAGE] = 1
        assert lib.gm_memfile_empty(fd, 0, 16 * PAGE) == 0
        assert lib.gm_memfile_empty(fd, 0, 7 * PAGE) == 1
    finally:
        os.close(fd)


@pytest.mark.usefixtures("require_kvm")
def test_a_signal_takes_no_page_away() -> None:
    """fallocate() gives up when one comes, whoever it is for."""
    signals: list[int] = []
    try:
        fd = check(lib.gm_memfile_guest_memfd, MANY_PAGES, lib.GM_GUEST_MEMFD_MMAP | lib.GM_GUEST_MEMFD_INIT_SHARED)
    except KernelError as error:
        pytest.skip(str(error))
    before = signal.signal(signal.SIGALRM, lambda number, _: signals.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    try:
        assert inside.gm_memfile_zero(fd, 0, MANY_PAGES) == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        os.close(fd)
    assert signals


def test_large_folios_are_told_and_left_alone(memfd: int) -> None:
    fd = large_file(512, PAGE)
    try:
        assert (lib.gm_memfile_large_folios(fd), lib.gm_memfile_large_folios(memfd)) == (1, 0)
        assert lib.gm_memfile_shown(fd, 0) == 0
        assert lib.gm_memfile_empty(fd, 0, HUGE) == 1
    finally:
        os.close(fd)


def test_what_is_no_memory_file_is_refused() -> None:
    ends = os.pipe()
    try:
        with pytest.raises(HandoffError, match="not a memory file"):
            kind(ends[0])
    finally:
        for end in ends:
            os.close(end)
    with pytest.raises(KernelError, match="descriptor -1") as caught:
        kind(-1)
    assert caught.value.errno == errno.EBADF


def test_a_page_size_that_there_is_not() -> None:
    with pytest.raises(KernelError, match="memfd: pages of 8192 bytes"):
        check(lib.gm_memfile_memfd, b"odd", 8192, 8192)


def test_empty_ranges(memfd: int) -> None:
    assert lib.gm_memfile_empty(memfd, 0, 16 * PAGE) == 1
    os.pwrite(memfd, b"x", 5 * PAGE)
    assert lib.gm_memfile_empty(memfd, 0, 16 * PAGE) == 0
    assert lib.gm_memfile_empty(memfd, 0, 5 * PAGE) == 1
    assert lib.gm_memfile_empty(memfd, 5 * PAGE, PAGE) == 0
    assert lib.gm_memfile_empty(memfd, 6 * PAGE, 10 * PAGE) == 1


def test_data_of_a_range(memfd: int) -> None:
    out = ffi.new("uint64_t[2]")
    for page in (2, 3, 9):
        os.pwrite(memfd, b"x", page * PAGE)
    found = []
    at = 0
    while lib.gm_memfile_data(memfd, at, 16 * PAGE, out):
        found.append((out[0] // PAGE, out[1] // PAGE))
        at = out[1]
    assert found == [(2, 4), (9, 10)]
    assert not lib.gm_memfile_data(memfd, 4 * PAGE, 9 * PAGE, out)


def test_a_truncated_mapping_gives_an_error_and_no_signal(memfd: int) -> None:
    """Where memcpy would have died of SIGBUS; what is before the end is copied all the same."""
    with mmap.mmap(memfd, 16 * PAGE, mmap.MAP_SHARED) as mapped:
        at = inside_ffi.cast("char *", address_of(mapped))
        assert inside.gm_guarded_store(at, content(0) + content(1), 2 * PAGE) == 0
        buffer = inside_ffi.new("char[]", 2 * PAGE)
        assert inside.gm_guarded_load(buffer, at, 2 * PAGE) == 0
        assert bytes(inside_ffi.buffer(buffer)) == content(0) + content(1)
        os.truncate(memfd, PAGE)
        assert inside.gm_guarded_store(at, content(2) + content(3), 2 * PAGE) == -errno.EFAULT
        assert inside.gm_guarded_load(buffer, at + PAGE, PAGE) == -errno.EFAULT
        assert os.pread(memfd, 2 * PAGE, 0) == content(2)


@pytest.mark.parametrize("way", [lib.GM_POPULATE_WRITE, lib.GM_POPULATE_RECV, lib.GM_POPULATE_COPY])
def test_ways_to_populate_can_be_measured(memfd: int, way: int) -> None:
    assert check(lib.gm_measure_populate, memfd, way, 16 * PAGE) > 0
    assert lib.gm_memfile_empty(memfd, 0, 16 * PAGE) == 0


def test_a_way_that_does_not_work_is_no_measurement(memfd: int) -> None:
    """A descriptor for reading only takes no write."""
    reader = os.open(f"/proc/self/fd/{memfd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with pytest.raises(KernelError):
            check(lib.gm_measure_populate, reader, lib.GM_POPULATE_WRITE, 16 * PAGE)
    finally:
        os.close(reader)
