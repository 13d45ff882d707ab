"""A start that comes to nothing while guests are kept for us. With the exit code of a wrong configuration, the service
manager would let go of them; started again at once and for ever, we would fill its log. So it waits until something is
mended."""

import gc
import time
from pathlib import Path

from gmemd import config
from gmemd.errors import ConfigError

LONGEST = 60.0  # of TimeoutStartSec=90; some mistakes are mended elsewhere than in these files
SOON = 5.0  # what does not stand in files, as an address that somebody else has
LOOK = 0.5
USERS = (Path("/etc/passwd"), Path("/etc/group"))  # the configuration names some

Stamp = tuple[int, int] | None
Stamps = dict[Path, Stamp]


def look(file: Path | None) -> Stamps:
    """At what a start depends on, before it: the configuration file, those that it names, and the users of this
    host."""
    return {path: _stamp(path) for path in (file or config.DEFAULT_PATH, *_named(file), *USERS)}


def wait(before: Stamps, longest: float) -> None:
    """Returns when any of that has changed, or after so many seconds. Signals end the process."""
    gc.collect()  # closes what the start has opened: sources would wait for an answer there
    until = time.monotonic() + longest
    while time.monotonic() < until and {path: _stamp(path) for path in before} == before:
        time.sleep(LOOK)


def _named(file: Path | None) -> list[Path]:
    try:
        tls = config.load(file).tls
    except ConfigError:
        return []
    return [path for key in config.KINDS["tls"] if isinstance(path := getattr(tls, key), Path)]


def _stamp(path: Path) -> Stamp:
    """Another one when its content, its owner or its mode has changed."""
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_ino, info.st_ctime_ns
