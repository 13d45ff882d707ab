"""guest_memfd out of the direct map: EEXIST says that a page has content, and not whose."""

import os

import pytest
from native_frames import pages, zeros
from native_rig import PAGE, Guest, content, watched

from gmemd.errors import GmemdError
from gmemd.native import check, lib
from gmemd.native.memory import Populate

PAGES = 64
SHARED = lib.GM_GUEST_MEMFD_MMAP | lib.GM_GUEST_MEMFD_INIT_SHARED
FLAGS = SHARED | lib.GM_GUEST_MEMFD_NO_DIRECT_MAP | lib.GM_GUEST_MEMFD_WRITE

pytestmark = pytest.mark.lab


@pytest.fixture
def file() -> int:
    """Pages 3 and 5 of it are populated, as a daemon leaves them that dies before it marks them; the guest owns it."""
    try:
        fd = check(lib.gm_memfile_guest_memfd, PAGES * PAGE, FLAGS)
    except GmemdError as error:
        if os.environ.get("GMEMD_LAB") == "1":
            raise
        pytest.skip(str(error))
    for page in (3, 5):
        os.pwrite(fd, b"\xee" * PAGE, page * PAGE)
    return fd


@pytest.mark.parametrize("populate", Populate)
def test_a_page_that_has_content_and_no_mark_gets_ours(file: int, populate: Populate) -> None:
    with pytest.raises(FileExistsError):
        os.pwrite(file, content(3), 3 * PAGE)
    with Guest((PAGES, PAGE), files=[file], populate=populate) as guest, watched(guest):
        guest.line().feed(pages(0, 0, b"".join(content(page) for page in range(8))))
        assert [guest.read(page) for page in range(8)] == [content(page) for page in range(8)]
        assert guest.received() == set(range(8))


def test_a_page_that_is_ours_is_not_written_again(file: int) -> None:
    """Not because the kernel would refuse it: what the guest has written since stays."""
    with Guest((PAGES, PAGE), files=[file]) as guest, watched(guest):
        line = guest.line()
        line.feed(pages(0, 3, content(3)))
        guest.write(3, b"the guest's")
        line.feed(pages(0, 0, b"".join(content(page) for page in range(8))))
        assert guest.read(3) == b"the guest's" + content(3)[11:]
        assert guest.counter("dropped_pages") == 1
        line.feed(zeros(0, 3, 1))
        assert guest.read(3)[:11] == b"the guest's"
