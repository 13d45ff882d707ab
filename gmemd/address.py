"""TCP addresses, as people write and read them."""

import re
from collections.abc import Sequence
from ipaddress import IPv6Address, ip_address
from typing import Any, NamedTuple, Self

MAX_PORT = 65535


class Address(NamedTuple):
    """A TCP address. `str()` gives the form that `parse_address` reads."""

    host: str
    port: int

    @classmethod
    def of(cls, name: Sequence[Any]) -> Self:
        """From what a socket says. To one that takes both, a host that comes by IPv4 has an IPv6 address made of its
        own."""
        return cls(_unmapped(name[0]), name[1])

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Reads `host:port`, an IPv6 host in brackets. Port 0 lets the kernel choose one. Raises ValueError."""
    match = re.fullmatch(r"(?:\[([^][]+)\]|([\w.-]+)):([0-9]{1,5})", text, re.ASCII)
    if match is None or int(match[3]) > MAX_PORT or not (match[2] or _is_ipv6(match[1])):
        raise ValueError("must be host:port, with an IPv6 host in brackets")
    return Address(match[1] or match[2], int(match[3]))


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(_unmapped(host)).is_loopback
    except ValueError:
        return False


def _is_ipv6(host: str) -> bool:
    try:
        return bool(IPv6Address(host))
    except ValueError:
        return False


def _unmapped(host: str) -> str:
    """The IPv4 address in ::ffff:192.0.2.1; any other host as it is."""
    mapped = IPv6Address(host).ipv4_mapped if _is_ipv6(host) else None
    return str(mapped) if mapped else host
