"""Whether this host has room for both ends of a migration."""

from gmemd.errors import UnavailableError
from gmemd.probe_host import available_memory


def check(size: int, what: str) -> None:
    """`what` is how the guest was asked for. Without a check, the kernel ends some process when memory runs out."""
    free = available_memory().value
    if isinstance(free, int) and 2 * size > free:
        raise UnavailableError(f"{what}: this host has no room for that twice: {free >> 20} MiB are free")
