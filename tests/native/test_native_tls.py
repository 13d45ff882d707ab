"""Hand-shakes between two ends on real sockets: who is let in, who is not, and what each end then says."""

import os
import re
import socket
import ssl
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from gmemd.errors import GmemdError, KernelError, LinkError, UntrustedError
from gmemd.native.tls import Pem, Tls, TlsContext, Wants
from gmemd_tools.demo.certificates import Authority, Identity

KEY = bytes(range(32))


class Ends(NamedTuple):
    """Both ends of a connection."""

    server: Tls
    client: Tls
    sockets: tuple[socket.socket, socket.socket]


class Hosts(NamedTuple):
    """Certificates of all kinds."""

    ca: Authority
    other_ca: Authority
    src: Identity
    dst: Identity
    expired: Identity
    stranger: Identity
    nameless: Identity


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Hosts:
    ca = Authority(tmp_path_factory.mktemp("ca"))
    other = Authority(tmp_path_factory.mktemp("other"), "other ca")
    return Hosts(
        ca,
        other,
        ca.issue("src", "DNS:src.example", "URI:spiffe://cluster/src", "IP:10.0.0.1"),
        ca.issue("dst", "DNS:dst.example"),
        ca.issue("old", "DNS:src.example", days=-1),
        other.issue("stranger", "DNS:src.example"),
        ca.issue("src.example"),
    )


def pem(identity: Identity, ca: Authority | None = None) -> Pem:
    roots = ca.certificate if ca else identity.ca
    return Pem(identity.certificate.read_bytes(), identity.key.read_bytes(), roots.read_bytes())


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    for end in (client, server):
        end.setblocking(False)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with client, server:
        yield server, client


def shake(*ends: Tls) -> list[GmemdError | None]:
    """Has them shake hands until each has done with it; returns what went wrong at each. A client is done before
    the server has looked at its certificate: it hears of that when it reads."""
    errors: list[GmemdError | None] = [None] * len(ends)
    busy = set(range(len(ends)))
    for _ in range(10):
        for i in sorted(busy):
            try:
                if ends[i].shake_hands() is None:
                    busy.discard(i)
            except GmemdError as error:
                errors[i] = error
                busy.discard(i)
    assert not busy
    return errors


def connected(pair: tuple[socket.socket, socket.socket], server: TlsContext, client: TlsContext) -> Ends:
    return Ends(Tls(server, pair[0].fileno()), Tls(client, pair[1].fileno()), pair)


def refusals(ends: Ends) -> tuple[str, str]:
    """What the server and the client say when it comes to nothing."""
    server, client = shake(ends.server, ends.client)
    if client is None:
        with pytest.raises(GmemdError) as caught:
            ends.client.read(1)
        client = caught.value
    assert isinstance(server, UntrustedError)
    assert isinstance(client, UntrustedError)
    return str(server), str(client)


def both(hosts: Hosts) -> tuple[TlsContext, TlsContext]:
    return TlsContext(server=True, pem=pem(hosts.dst)), TlsContext(server=False, pem=pem(hosts.src))


def test_both_know_each_other(pair: tuple[socket.socket, socket.socket], hosts: Hosts) -> None:
    ends = connected(pair, *both(hosts))
    assert shake(ends.server, ends.client) == [None, None]
    src, dst = ends.server, ends.client  # the peer that each sees
    assert re.fullmatch(
        r'certificate "CN=src", names DNS:src\.example URI:spiffe://cluster/src IP:10\.0\.0\.1, '
        r'issuer "CN=gmemd ca", valid \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ to \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ',
        src.peer,
    )
    assert [
        name
        for name in ("src.example", "SRC.example", ".example", "spiffe://cluster/src", "10.0.0.1", "src")
        if src.peer_is(name)
    ] == ["src.example", "SRC.example", ".example", "spiffe://cluster/src", "10.0.0.1"]
    for name in ("example", "dst.example", "c.example", "*.example", "spiffe://cluster/srcs", "10.0.0.2", ""):
        assert not src.peer_is(name)
    assert dst.peer_is("dst.example")
    assert not src.is_shared
    assert ends.client.write(memoryview(b"page")) == 4
    assert ends.server.read(100) == b"page"
    assert ends.server.read(100) is Wants.READ


def test_a_certificate_without_names_has_none(pair: tuple[socket.socket, socket.socket], hosts: Hosts) -> None:
    """The subject does not count, even if it looks like a name."""
    server, _ = both(hosts)
    ends = connected(pair, server, TlsContext(server=False, pem=pem(hosts.nameless)))
    assert shake(ends.server, ends.client) == [None, None]
    assert not ends.server.peer_is("src.example")
    assert "no names" in ends.server.peer


def test_no_certificate(pair: tuple[socket.socket, socket.socket], hosts: Hosts) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(hosts.ca.certificate)
    server, _ = both(hosts)
    session = Tls(server, pair[0].fileno())
    with context.wrap_socket(pair[1], do_handshake_on_connect=False) as client:
        with pytest.raises(ssl.SSLWantReadError):
            client.do_handshake()
        assert session.shake_hands() is Wants.READ
        client.do_handshake()
        with pytest.raises(UntrustedError, match=r"^TLS: it shows no certificate$"):
            session.shake_hands()
        with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
            client.read(1)


def test_expired(pair: tuple[socket.socket, socket.socket], hosts: Hosts) -> None:
    server, _ = both(hosts)
    at_server, at_client = refusals(connected(pair, server, TlsContext(server=False, pem=pem(hosts.expired))))
    assert at_server.startswith('TLS: certificate has expired: certificate "CN=old", names DNS:src.example, issuer')
    assert at_client == "TLS: it refuses us: certificate expired"


def test_wrong_ca(pair: tuple[socket.socket, socket.socket], hosts: Hosts) -> None:
    server, _ = both(hosts)
    client = TlsContext(server=False, pem=pem(hosts.stranger, hosts.ca))
    at_server, at_client = refusals(connected(pair, server, client))
    assert at_server.startswith("TLS: unable to get local issuer certificate: certificate")
    assert 'issuer "CN=gmemd other ca"' in at_server
    assert at_client == "TLS: it refuses us: unknown CA"


def test_wrong_ca_of_the_server(pair: tuple[socket.socket, socket.socket], hosts: Hosts) -> None:
    _, client = both(hosts)
    server = TlsContext(server=True, pem=pem(hosts.stranger, hosts.ca))
    at_server, at_client = refusals(connected(pair, server, client))
    assert at_client.startswith("TLS: unable to get local issuer certificate: certificate")
    assert at_server == "TLS: it refuses us: unknown CA"


def test_tls_1_2(pair: tuple[socket.socket, socket.socket], hosts: Hosts) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(hosts.ca.certificate)
    context.load_cert_chain(hosts.src.certificate, hosts.src.key)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    server, _ = both(hosts)
    session = Tls(server, pair[0].fileno())
    with context.wrap_socket(pair[1], do_handshake_on_connect=False) as client:
        with pytest.raises(ssl.SSLWantReadError):
            client.do_handshake()
        with pytest.raises(UntrustedError, match=r"^TLS: it does not speak TLS 1\.3$"):
            session.shake_hands()
        with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
            client.do_handshake()


def test_plain_text(pair: tuple[socket.socket, socket.socket], hosts: Hosts) -> None:
    server, _ = both(hosts)
    pair[1].send(b"GMEMD\0\1\0" + bytes(100))
    with pytest.raises(UntrustedError, match=r"^TLS: it does not speak TLS$"):
        Tls(server, pair[0].fileno()).shake_hands()


def test_plain_text_in_answer(pair: tuple[socket.socket, socket.socket], hosts: Hosts) -> None:
    _, client = both(hosts)
    pair[0].send(b"GMEMD\0\1\0" + bytes(100))
    session = Tls(client, pair[1].fileno())
    with pytest.raises(UntrustedError, match=r"^TLS: it does not speak TLS$"):
        session.shake_hands()


def test_replayed_hand_shake(pair: tuple[socket.socket, socket.socket], hosts: Hosts) -> None:
    """All that a client said, said once more: the server's answer is another, and none of it fits."""
    server, client = both(hosts)
    said = b""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    with near, far:
        far.setblocking(False)
        near.setblocking(False)
        good = Tls(client, near.fileno())
        session = Tls(server, pair[0].fileno())
        while good.shake_hands() is not None:
            said += (part := far.recv(65536))
            pair[1].send(part)
            session.shake_hands()
            far.send(pair[1].recv(65536))
        said += (part := far.recv(65536))
        pair[1].send(part)
        assert session.shake_hands() is None
        assert session.peer_is("src.example")
    pair[1].close()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    with near, far:
        far.setblocking(False)
        near.send(said)
        (error,) = shake(Tls(server, far.fileno()))
    assert isinstance(error, LinkError)
    assert str(error) == "TLS: during the hand-shake: decryption failed or bad record mac"


@pytest.mark.parametrize("certified", [False, True], ids=["only keys", "server has a certificate, too"])
def test_shared_key(pair: tuple[socket.socket, socket.socket], hosts: Hosts, certified: bool) -> None:
    server = TlsContext(
        server=True, pem=pem(hosts.dst) if certified else None, shared={"pair a": KEY, "pair b": KEY[::-1]}
    )
    ends = connected(pair, server, TlsContext(server=False, shared={"pair b": KEY[::-1]}))
    assert shake(ends.server, ends.client) == [None, None]
    assert ends.server.peer == ends.client.peer == 'pre-shared key "pair b"'
    assert ends.server.peer_is("pair b")
    assert not ends.server.peer_is("pair a")
    assert ends.server.is_shared
    assert ends.client.is_shared
    assert ends.server.write(memoryview(b"page")) == 4
    assert ends.client.read(100) == b"page"


def test_shared_key_off_by_a_bit(pair: tuple[socket.socket, socket.socket]) -> None:
    server = TlsContext(server=True, shared={"pair": KEY})
    wrong = bytes([KEY[0] ^ 1]) + KEY[1:]
    at_server, at_client = refusals(connected(pair, server, TlsContext(server=False, shared={"pair": wrong})))
    assert at_server == "TLS: its pre-shared key is not ours of that name"
    assert at_client in ("TLS: it refuses us: illegal parameter", "TLS: it refuses us: decrypt error")  # by OpenSSL 3.5


def test_shared_key_of_an_unknown_name(pair: tuple[socket.socket, socket.socket]) -> None:
    server = TlsContext(server=True, shared={"pair": KEY})
    assert refusals(connected(pair, server, TlsContext(server=False, shared={"other pair": KEY}))) == (
        "TLS: it shares no key with us, and we have no certificate to show",
        "TLS: it refuses us: handshake failure",
    )


def test_a_client_with_a_key_takes_no_certificate(pair: tuple[socket.socket, socket.socket], hosts: Hosts) -> None:
    server, _ = both(hosts)
    at_server, at_client = refusals(connected(pair, server, TlsContext(server=False, shared={"pair": KEY})))
    assert at_client.startswith("TLS: unable to get local issuer certificate: certificate")
    assert at_server == "TLS: it refuses us: unknown CA"


def test_a_session_of_many_records_ends(pair: tuple[socket.socket, socket.socket], hosts: Hosts) -> None:
    ends = connected(pair, *both(hosts))
    assert shake(ends.server, ends.client) == [None, None]
    ends.client.set_most_records(2)
    for _ in range(2):
        assert ends.client.write(memoryview(b"x")) == 1
    with pytest.raises(LinkError, match="as much was sent as one key is good for"):
        ends.client.write(memoryview(b"x"))


def test_goodbye_and_cut(pair: tuple[socket.socket, socket.socket], hosts: Hosts) -> None:
    ends = connected(pair, *both(hosts))
    assert shake(ends.server, ends.client) == [None, None]
    ends.client.close()
    assert ends.server.read(10) == b""
    assert ends.server.write(memoryview(b"still")) == 5
    assert ends.client.read(10) == b"still"
    pair[0].close()
    assert ends.client.read(10) == b""


def test_a_flipped_bit_is_the_connections_fault(pair: tuple[socket.socket, socket.socket], hosts: Hosts) -> None:
    """At both ends: nobody has refused anybody. The kernel would not encipher for what takes the socket's place, and
    one that deciphers has OpenSSL say nothing to the peer."""
    server = TlsContext(server=True, pem=pem(hosts.dst), ktls=False)
    ends = connected(pair, server, TlsContext(server=False, pem=pem(hosts.src), ktls=False))
    assert shake(ends.server, ends.client) == [None, None]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    with near, far:
        kept = os.dup(pair[1].fileno())
        os.dup2(near.fileno(), pair[1].fileno())
        ends.client.write(memoryview(b"page"))
        os.dup2(kept, pair[1].fileno())
        os.close(kept)
        record = bytearray(far.recv(4096))
    record[-1] ^= 1
    pair[1].send(record)
    with pytest.raises(LinkError, match="reading: decryption failed or bad record mac"):
        ends.server.read(10)
    with pytest.raises(LinkError, match="it cannot read us: bad record mac"):
        ends.client.read(10)


def test_a_full_socket_and_much_to_say(pair: tuple[socket.socket, socket.socket], hosts: Hosts) -> None:
    """Whatever does not fit is said later, from another place, and comes in one piece."""
    ends = connected(pair, *both(hosts))
    assert shake(ends.server, ends.client) == [None, None]
    for end in pair:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    said, heard, full = bytes(range(256)) * 4096, b"", 0
    put = 0
    while len(heard) < len(said):
        gone = ends.client.write(memoryview(bytes(said[put:]))) if put < len(said) else Wants.READ
        if isinstance(gone, int):
            put += gone
            continue
        full += gone is Wants.WRITE
        while isinstance(some := ends.server.read(10_000), bytes):
            heard += some
    assert heard == said
    assert full > 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p._replace(certificate=b"nonsense"), "not a certificate in PEM"),
        (lambda p: p._replace(key=b"nonsense"), "not a key in PEM"),
        (lambda p: p._replace(ca=b"nonsense"), "no certificates in PEM"),
        (
            lambda p: p._replace(certificate=p.certificate + p.ca[:-40]),
            "a certificate of the chain that is not whole: ",
        ),
        (lambda p: p._replace(ca=p.ca + p.certificate[:-40]), "^a certificate that is not whole: "),
    ],
)
def test_bad_files(hosts: Hosts, spoil: object, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        TlsContext(server=True, pem=spoil(pem(hosts.dst)))  # type: ignore[operator]


def test_key_of_another(hosts: Hosts) -> None:
    with pytest.raises(KernelError, match="not the key of the certificate"):
        TlsContext(server=True, pem=pem(hosts.dst)._replace(key=hosts.src.key.read_bytes()))


def test_an_own_certificate_is_described(hosts: Hosts) -> None:
    text, left = TlsContext(server=True, pem=pem(hosts.dst)).describe()
    assert text.startswith('certificate "CN=dst", names DNS:dst.example, issuer "CN=gmemd ca"')
    assert 23 * 3600 < left <= 24 * 3600
    assert TlsContext(server=True, pem=pem(hosts.expired)).describe()[1] < 0
    assert TlsContext(server=True, shared={"pair": KEY}).describe() == ("", 0)
