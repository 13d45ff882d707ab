"""TCP addresses: how they are read, how a socket's are written, and which are this host's."""

import pytest

from gmemd.address import Address, is_loopback, parse_address


@pytest.mark.parametrize("text", ["host:1", "127.0.0.1:65535", "[::1]:0", "[fe80::1%eth0]:75"])
def test_addresses(text: str) -> None:
    assert str(parse_address(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", ":1", "host", "host:", "host:65536", "host:-1", "::1:1", "[::1]", "[host]:1", "a b:1", "a:1\n"],
)
def test_not_an_address(text: str) -> None:
    with pytest.raises(ValueError, match="must be host:port"):
        parse_address(text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (("10.0.0.1", 7575), "10.0.0.1:7575"),
        (("2001:db8::1", 7575, 0, 0), "[2001:db8::1]:7575"),
        (("fe80::1%eth0", 7575, 0, 3), "[fe80::1%eth0]:7575"),
        (("::ffff:10.0.0.1", 7575, 0, 0), "10.0.0.1:7575"),
    ],
)
def test_what_a_socket_says(name: tuple[str | int, ...], text: str) -> None:
    assert str(Address.of(name)) == text


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("::", False),
        ("0.0.0.0", False),
        ("::ffff:10.0.0.1", False),
        ("fe80::1%lo", False),
        ("localhost.example", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback
