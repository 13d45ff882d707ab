"""The C helper: userfaultfd, memory files, bitmaps, page frames, and the loops that answer faults.

The classes of this package own what the C side allocates, and keep alive what it points to. A call that fails raises
one of `gmemd.errors`, with the message that the C side wrote. Every call releases the GIL.
"""

from gmemd.native._errors import check, checked
from gmemd.native._native import ffi, lib

__all__ = ["check", "checked", "crc32c", "ffi", "keep_secret", "lib"]


def crc32c(data: bytes) -> int:
    """The CRC-32C of some bytes."""
    return int(lib.gm_crc32c(0, data, len(data)))


def keep_secret() -> None:
    """From now on this process leaves no core dump, and only root may look into its memory or take its descriptors."""
    check(lib.gm_keep_secret)
