"""Hand-shakes where an end has lists of revoked certificates: whom it lets in, and what each end says."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.revocation import FUTURE, PAST, TODAY, intermediate, revoked

from gmemd.errors import KernelError, UntrustedError
from gmemd.native.tls import Pem, Tls, TlsContext
from gmemd_tools.demo.certificates import Authority, Identity

UNKNOWN = "TLS: it refuses us: certificate unknown: its own log says why"
REVOKED = "TLS: it refuses us: certificate revoked"


class World(NamedTuple):
    """A root, an authority below it, and certificates of both."""

    root: Authority
    middle: Authority
    src: Identity
    dst: Identity
    below: Identity  # shows the chain


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = Authority(tmp_path_factory.mktemp("root"))
    middle = intermediate(tmp_path_factory.mktemp("middle"), root)
    below = middle.issue("below", "DNS:below.example")
    below.certificate.write_bytes(below.certificate.read_bytes() + middle.certificate.read_bytes())
    src, dst = root.issue("src", "DNS:src.example"), root.issue("dst", "DNS:dst.example")
    return World(root, middle, src, dst, below._replace(ca=root.certificate))


ListOf = Callable[..., bytes]


@pytest.fixture
def list_of(tmp_path: Path) -> ListOf:
    def make(authority: Authority, *certificates: Path, when: tuple[str, ...] = TODAY) -> bytes:
        folder = tmp_path / f"list {len(list(tmp_path.iterdir()))}"
        return revoked(folder, authority, *certificates, when=when).read_bytes()

    return make


def pem(identity: Identity, crl: bytes | None = None) -> Pem:
    certificate, key, ca = (path.read_bytes() for path in identity)
    return Pem(certificate, key, ca, crl)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(False)
    yield ends
    for end in ends:
        end.close()


def shake(pair: tuple[socket.socket, socket.socket], server: Pem, client: Pem) -> tuple[str, str]:
    """What each end says against the other; "" if nothing."""
    ends = (
        Tls(TlsContext(server=True, pem=server), pair[0].fileno()),
        Tls(TlsContext(server=False, pem=client), pair[1].fileno()),
    )
    said: list[str | None] = [None, None]
    for _ in range(8):
        for place, end in enumerate(ends):
            if said[place] is None:
                said[place] = step(end)
    if said[0] and said[1] == "":  # it hears of that only now
        with pytest.raises(UntrustedError) as caught:
            ends[1].read(1)
        said[1] = str(caught.value)
    return said[0] or "", said[1] or ""


def step(end: Tls) -> str | None:
    try:
        return None if end.shake_hands() else ""
    except UntrustedError as error:
        return str(error)


def test_nobody_on_it(world: World, list_of: ListOf, pair: tuple[socket.socket, socket.socket]) -> None:
    crl = list_of(world.root, world.below.certificate)
    assert shake(pair, pem(world.dst, crl), pem(world.src, crl)) == ("", "")


def test_a_client_on_it(world: World, list_of: ListOf, pair: tuple[socket.socket, socket.socket]) -> None:
    crl = list_of(world.root, world.src.certificate)
    server, client = shake(pair, pem(world.dst, crl), pem(world.src, crl))
    assert server.startswith('TLS: certificate revoked: certificate "CN=src", names DNS:src.example, issuer ')
    assert client == REVOKED


def test_a_server_on_it(world: World, list_of: ListOf, pair: tuple[socket.socket, socket.socket]) -> None:
    server, client = shake(pair, pem(world.dst), pem(world.src, list_of(world.root, world.dst.certificate)))
    assert client.startswith('TLS: certificate revoked: certificate "CN=dst"')
    assert server == REVOKED


@pytest.mark.parametrize(("when", "why"), [(PAST, "has expired"), (FUTURE, "is not valid yet")])
def test_a_list_out_of_its_time(
    world: World, list_of: ListOf, pair: tuple[socket.socket, socket.socket], when: tuple[str, ...], why: str
) -> None:
    """It says nothing of anybody, so nobody comes in."""
    crl = list_of(world.root, when=when)
    server, client = shake(pair, pem(world.dst, crl), pem(world.src))
    assert server.startswith(f'TLS: our list of what its issuer has revoked {why}: certificate "CN=src"')
    assert client == UNKNOWN


def test_a_list_of_another(world: World, list_of: ListOf, pair: tuple[socket.socket, socket.socket]) -> None:
    crl = list_of(world.middle)
    server, client = shake(pair, pem(world.dst, crl), pem(world.src))
    assert server.startswith('TLS: we have no list of what its issuer has revoked: certificate "CN=src"')
    assert client == UNKNOWN


def test_a_list_that_another_has_signed(
    world: World, list_of: ListOf, pair: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    (tmp_path / "impostor").mkdir()
    impostor = Authority(tmp_path / "impostor")  # of the same name
    server, client = shake(pair, pem(world.dst, list_of(impostor)), pem(world.src))
    assert server.startswith('TLS: our list of what its issuer has revoked has a wrong signature: certificate "CN=src"')
    assert client == UNKNOWN


def test_the_whole_chain(world: World, list_of: ListOf) -> None:
    """Each authority in it needs a list, and may be on that of the one above."""
    root, middle = list_of(world.root), list_of(world.middle)
    without = list_of(world.root, world.middle.certificate)
    for crl, told in (
        (root + middle, ""),
        (root, "TLS: we have no list of what its issuer has revoked: certificate"),
        (middle, "TLS: we have no list of what its issuer has revoked (1 above it): certificate"),
        (without + middle, "TLS: certificate revoked (1 above it): certificate"),
    ):
        ends = socket.socketpair()
        for end in ends:
            end.setblocking(False)
        with ends[0], ends[1]:
            server, _ = shake(ends, pem(world.dst, crl), pem(world.below))
        assert server.startswith(told)
        assert bool(server) == bool(told)


def test_bad_lists(world: World, list_of: ListOf) -> None:
    good = list_of(world.root)
    for bad in (b"nonsense", world.src.certificate.read_bytes(), good[:-40], good + good[:100], good + good[:-60]):
        with pytest.raises(KernelError, match=r"^not a list of revoked certificates in PEM$"):
            TlsContext(server=True, pem=pem(world.dst, bad))


def test_a_list_is_described(world: World, list_of: ListOf) -> None:
    """The one that ends first."""
    crl = list_of(world.root, when=("-crldays", "30")) + list_of(world.middle)
    text, left = TlsContext(server=True, pem=pem(world.dst, crl)).describe_list()
    assert text.startswith('revoked certificates of "CN=gmemd middle", valid 20')
    assert 23 * 3600 < left <= 24 * 3600
    assert TlsContext(server=True, pem=pem(world.dst, list_of(world.root, when=PAST))).describe_list()[1] < 0
    assert TlsContext(server=True, pem=pem(world.dst)).describe_list() == ("", 0)
