"""A wrong configuration while guests are kept for us. With the exit code of one, the service manager would let go of
them; started again at once and for ever, we would fill its log. So this start waits until something is mended."""

import gc
import time
from pathlib import Path

from gmemd import config
from gmemd.errors import ConfigError

LONGEST = 60.0  # of 90 s that a service manager gives a start; some mistakes are mended elsewhere than in these files
LOOK = 1.0
USERS = (Path("/etc/passwd"), Path("/etc/group"))  # the configuration names some


def wait(file: Path | None) -> None:
    """Returns when the configuration file, one that it names, or the users of this host have changed, or after
    LONGEST. Signals end the process."""
    gc.collect()  # closes what the start has opened: sources would wait for an answer there
    watched = [file or config.DEFAULT_PATH, *_named(file), *USERS]
    before = [_stamp(path) for path in watched]
    until = time.monotonic() + LONGEST
    while time.monotonic() < until and [_stamp(path) for path in watched] == before:
        time.sleep(LOOK)


def _named(file: Path | None) -> list[Path]:
    try:
        tls = config.load(file).tls
    except ConfigError:
        return []
    return [path for path in (tls.certificate, tls.key, tls.ca, tls.crl, tls.psk) if path]


def _stamp(path: Path) -> tuple[int, int] | None:
    """Another one when its content, its owner or its mode has changed."""
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_ino, info.st_ctime_ns
