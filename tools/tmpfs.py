"""Memory files in large folios, whatever the host says of memfds: each on a tmpfs of its own, which ends with it."""

import os
import subprocess
from functools import cache
from tempfile import TemporaryDirectory

FOLIO = 2 << 20


class NoLargeFolios(Exception):
    """There are none here, and why."""


def large_folio_file(size: int) -> int:
    """A file of at least `size` bytes, as long as a folio has to be within it. NoLargeFolios where it cannot be."""
    with TemporaryDirectory(prefix="gmemd-tmpfs-") as folder:
        options = "huge=within_size,size=0,mode=700"
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "gmemd", folder], capture_output=True, text=True
        )
        if mounted.returncode:
            raise NoLargeFolios(mounted.stderr.strip())
        try:
            fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)
    os.truncate(fd, -(-size // FOLIO) * FOLIO)
    if os.fstat(fd).st_blksize < FOLIO:
        os.close(fd)
        raise NoLargeFolios("this kernel has none")
    return fd


@cache
def missing() -> str | None:
    """Why there are no large folios here, if so."""
    try:
        os.close(large_folio_file(FOLIO))
    except NoLargeFolios as error:
        return f"large folios: {error}"
    return None
