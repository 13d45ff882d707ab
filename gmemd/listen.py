"""Descriptors that the service manager hands over at start: its sockets, and what we had it keep."""

import os
import re
from collections.abc import MutableMapping

from gmemd.errors import ConfigError

FIRST = 3  # after stdin, stdout and stderr
VARIABLES = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
NAMELESS = "unknown"  # what systemd calls them, too


def take_descriptors(environ: MutableMapping[str, str] = os.environ) -> dict[str, list[int]]:
    """The descriptors by name, in the order handed over; the caller owns them.

    The variables are removed, and the descriptors closed on exec, so that no child takes them for its own.
    Raises ConfigError when the variables contradict each other or the facts.
    """
    number, pid, names = (environ.pop(variable, "") for variable in VARIABLES)
    if pid != str(os.getpid()):  # meant for another process, which forgot to remove them
        return {}
    if re.fullmatch("[0-9]{1,5}", number) is None:
        raise ConfigError(f"LISTEN_FDS={number}: not a number of descriptors: set by the service manager")
    count = int(number)
    listed = names.split(":") if names else [NAMELESS] * count
    if len(listed) != count:
        raise ConfigError(f"LISTEN_FDS={count} with {len(listed)} names: set by the service manager")
    taken: dict[str, list[int]] = {}
    for fd, name in enumerate(listed, FIRST):
        try:
            os.set_inheritable(fd, False)
        except OSError as error:
            raise ConfigError(f"LISTEN_FDS={count}, but {fd} ({name}): {error.strerror}") from None
        taken.setdefault(name, []).append(fd)
    return taken
