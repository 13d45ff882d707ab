"""A daemon that wants TLS: who gets in, who does not, and what both ends say of it in one line."""

import os
import re
import shutil
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import trio
from support.daemon import DaemonProcess
from support.source import SourceProcess
from support.vmm import Vmm

from gmemd.credentials import Credentials, Files
from gmemd.errors import ConfigError, UntrustedError
from gmemd.migrate import wire
from gmemd.migrate.link import MessageStream, connect
from gmemd.migrate.tls import Secured
from gmemd_tools.demo.certificates import Authority, Identity

pytest_plugins = ["support.daemon_fixtures"]

TIMEOUT = 5.0
KEY = "00112233445566778899aabbccddeeff"
TLS = """tls = "require"
[tls]
certificate = "{dst.certificate}"
key = "{dst.key}"
ca = "{dst.ca}"
psk = "{psk}"
peers = [".example", "pair"]
[sources]
"vm-*" = ["src.example", "pair"]
"other-*" = ["other.example"]
"""


class Hosts(NamedTuple):
    """Certificates of all kinds, and a file of keys."""

    ca: Authority
    src: Identity
    dst: Identity
    expired: Identity
    foreign: Identity
    stranger: Identity
    psk: Path


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Hosts:
    folder = tmp_path_factory.mktemp("ca")
    ca, other = Authority(folder), Authority(tmp_path_factory.mktemp("other"), "other ca")
    return Hosts(
        ca,
        ca.issue("src", "DNS:src.example"),
        ca.issue("dst", "IP:127.0.0.1"),
        ca.issue("old", "DNS:src.example", days=-1),
        other.issue("foreign", "DNS:src.example"),
        ca.issue("stranger", "DNS:elsewhere.invalid"),
        secret(folder / "psk", f"# who shares it\npair:{KEY}\n"),
    )


def secret(path: Path, text: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, hosts: Hosts) -> Iterator[DaemonProcess]:
    """A daemon that wants TLS."""
    with DaemonProcess(tmp_path_factory.mktemp("guarded"), TLS.format(dst=hosts.dst, psk=hosts.psk)) as daemon:
        yield daemon
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log.read_text()


class Log:
    """What a daemon says from now on, or from its start: what it has said already it may not say again."""

    def __init__(self, daemon: DaemonProcess, *, from_start: bool = False) -> None:
        self._path = daemon.log
        self._start = 0 if from_start else len(self._path.read_text())

    async def line(self, pattern: str) -> str:
        """The first that fits."""
        with trio.fail_after(TIMEOUT):
            while True:
                for line in self._path.read_text()[self._start :].splitlines():
                    if re.search(pattern, line):
                        return line
                await trio.sleep(0.005)


def secured(identity: Identity, ca: Path, *names: str) -> Secured:
    files = Files(certificate=identity.certificate, key=identity.key, ca=ca)
    return Secured(Credentials(files, server=False).context, names or ["127.0.0.1"])


def shared(path: Path) -> Secured:
    return Secured(Credentials(Files(psk=path), server=False).context, [])


async def greet(port: int, how: Secured | None, *hello: wire.Message) -> wire.Message:
    """Connects, says hello, and returns the first answer; raises what a source would."""
    messages: MessageStream = await connect("127.0.0.1", port, TIMEOUT, how)
    async with messages.stream:
        for message in hello or (wire.Hello("vm-1", 0, b"", 1, True, [[0, 16, 12]]),):
            await messages.send(message)
        with trio.fail_after(TIMEOUT):
            return await messages.receive()


async def test_those_who_may(guarded: DaemonProcess, hosts: Hosts) -> None:
    for how in (secured(hosts.src, hosts.ca.certificate), shared(hosts.psk)):
        assert await greet(guarded.port, how) == wire.Waiting()


@pytest.mark.parametrize(
    ("kind", "at_daemon", "at_source"),
    [
        (
            "expired",
            r'TLS: certificate has expired: certificate "CN=old", names DNS:src\.example, issuer "CN=gmemd ca", valid ',
            "TLS: it refuses us: certificate expired",
        ),
        (
            "foreign",
            r'TLS: unable to get local issuer certificate: certificate "CN=foreign", .* issuer "CN=gmemd other ca"',
            "TLS: it refuses us: unknown CA",
        ),
        ("psk", "refused: TLS: its pre-shared key is not ours of that name$", "TLS: it refuses us: "),
        (
            "psk name",
            r"refused: TLS: unable to get|refused: TLS: it refuses us: unknown CA$",
            "TLS: unable to get local",
        ),
    ],
)
async def test_those_who_may_not(
    guarded: DaemonProcess,
    hosts: Hosts,
    tmp_path: Path,
    kind: str,
    at_daemon: str,
    at_source: str,
    expect_log: Callable[[str], None],
) -> None:
    if kind == "psk":
        how = shared(secret(tmp_path / "psk", f"pair:{KEY[:-1]}e\n"))  # the last bit is another
    elif kind == "psk name":
        how = shared(secret(tmp_path / "psk", f"another pair:{KEY}\n"))
    else:
        if kind == "expired":
            expect_log('WARNING gmemd.credentials: our own certificate has expired: certificate "CN=old"')
        how = secured(getattr(hosts, kind), hosts.ca.certificate)
    log = Log(guarded, from_start=kind == "psk name")
    with pytest.raises(UntrustedError) as caught:
        await greet(guarded.port, how)
    assert str(caught.value).startswith(f"127.0.0.1:{guarded.port}: {at_source}")
    assert re.match(r"gmemd: warning: 127\.0\.0\.1:\d+: refused: TLS: ", await log.line(at_daemon))


async def test_no_certificate(guarded: DaemonProcess, hosts: Hosts) -> None:
    context = ssl.create_default_context(cafile=str(hosts.ca.certificate))
    log = Log(guarded)

    def connect() -> None:
        with (
            socket.create_connection(("127.0.0.1", guarded.port)) as sock,
            context.wrap_socket(sock, server_hostname="127.0.0.1") as wrapped,
            pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"),
        ):
            wrapped.recv(1)

    await trio.to_thread.run_sync(connect)
    await log.line(r"refused: TLS: it shows no certificate$")


async def test_tls_1_2(guarded: DaemonProcess, hosts: Hosts) -> None:
    context = ssl.create_default_context(cafile=str(hosts.ca.certificate))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    log = Log(guarded)

    def connect() -> None:
        with (
            socket.create_connection(("127.0.0.1", guarded.port)) as sock,
            pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"),
        ):
            context.wrap_socket(sock, server_hostname="127.0.0.1")

    await trio.to_thread.run_sync(connect)
    await log.line(r"refused: TLS: it does not speak TLS 1\.3$")


async def test_plain_text_to_tls(guarded: DaemonProcess) -> None:
    log = Log(guarded)
    why = "it does not speak TLS, which has to be spoken here: sent by the source"
    assert await greet(guarded.port, None) == wire.Refused(why)
    await log.line(f"refused: {why}$")


async def test_no_language_of_ours(guarded: DaemonProcess) -> None:
    log = Log(guarded)
    async with await trio.open_tcp_stream("127.0.0.1", guarded.port) as stream:
        await stream.send_all(b"SSH-2.0-OpenSSH_9.2\r\n")
        assert await stream.receive_some() == b""
    await log.line(r"refused: TLS: it does not speak TLS$")


async def test_tls_to_plain_text(daemon: DaemonProcess, hosts: Hosts) -> None:
    log = Log(daemon)
    with pytest.raises(UntrustedError, match=r"TLS: it does not speak TLS$"):
        await greet(daemon.port, secured(hosts.src, hosts.ca.certificate))
    await log.line("refused: it speaks TLS, and we do not: sent by the source$")


async def test_a_name_that_may_not_come(guarded: DaemonProcess, hosts: Hosts) -> None:
    log = Log(guarded)
    told = await greet(guarded.port, secured(hosts.stranger, hosts.ca.certificate))
    why = r'certificate "CN=stranger", .*: none of the peers that may come here: \.example, pair'
    assert isinstance(told, wire.Refused)
    assert re.match(why, told.why)
    await log.line(f"refused: {why}$")


@pytest.mark.parametrize(
    "first", [wire.Hello("other-1", 0, b"", 1, True, [[0, 16, 12]]), wire.LaneHello("other-1", 1, 0, bytes(16))]
)
async def test_a_migration_of_another(guarded: DaemonProcess, hosts: Hosts, first: wire.Message) -> None:
    log = Log(guarded)
    told = await greet(guarded.port, secured(hosts.src, hosts.ca.certificate), first)
    why = r'certificate "CN=src", .*: none of the peers that may feed migration other-1: other\.example'
    assert isinstance(told, wire.Refused)
    assert re.match(why, told.why)
    await log.line(f"refused: {why}$")


async def test_a_destination_of_another_name(guarded: DaemonProcess, hosts: Hosts) -> None:
    with pytest.raises(
        UntrustedError, match=r"\.0\.0\.1, .*: none of the names that the destination may have: dst2\.example$"
    ):
        await greet(guarded.port, secured(hosts.src, hosts.ca.certificate, "dst2.example"))


async def test_a_destination_of_another_authority(guarded: DaemonProcess, hosts: Hosts) -> None:
    log = Log(guarded, from_start=True)
    with pytest.raises(UntrustedError, match="TLS: unable to get local issuer certificate: certificate"):
        await greet(guarded.port, secured(hosts.foreign, hosts.foreign.ca))
    await log.line(r"refused: TLS: it refuses us: unknown CA$")


def own(identity: Identity) -> tuple[str, ...]:
    return (f"--certificate={identity.certificate}", f"--key={identity.key}", f"--ca={identity.ca}")


def test_a_guest_moves_and_certificates_change(hosts: Hosts, tmp_path: Path, content: bytes) -> None:
    """By certificate, by key, and with a certificate that was replaced while the daemon ran. A source of a session that
    is over is refused, as it is in plain text."""
    dst = Identity(*(Path(shutil.copy(path, tmp_path)) for path in hosts.dst))
    (tmp_path / "daemon").mkdir()
    with DaemonProcess(tmp_path / "daemon", TLS.format(dst=dst, psk=hosts.psk)) as daemon:
        for name, options in (("vm-1", own(hosts.src)), ("vm-2", (f"--psk={hosts.psk}",)), ("vm-3", own(hosts.src))):
            if name == "vm-3":
                new = hosts.ca.issue("new", "IP:127.0.0.1")
                for old, path in ((dst.certificate, new.certificate), (dst.key, new.key)):
                    os.replace(shutil.copy(path, tmp_path / "next"), old)
            with (
                Vmm(len(content)) as vmm,
                SourceProcess(daemon.port, name, "--file", tmp_path / "memory", options=options) as source,
            ):
                vmm.hand_off(daemon.socket, name).expect("ready")
                assert vmm.read(0, pages=len(content) // 4096) == content
                assert source.result().code == 0
                vmm.expect("done")
        assert 'TLS: we show certificate "CN=new"' in daemon.log.read_text()
        peers = {m["migration"]: (m["tls"], m["peer"].partition(",")[0]) for m in daemon.status()["finished"]}
        by_certificate = ("TLSv1.3", 'certificate "CN=src"')
        assert peers == {"vm-1": by_certificate, "vm-2": ("TLSv1.3", 'pre-shared key "pair"'), "vm-3": by_certificate}


async def test_a_stale_epoch(guarded: DaemonProcess, hosts: Hosts) -> None:
    """Of a migration that nobody has here; those of one that is there are as in plain text."""
    told = await greet(guarded.port, secured(hosts.src, hosts.ca.certificate), wire.LaneHello("vm-9", 7, 0, bytes(16)))
    assert told == wire.Refused("lane 0: no migration vm-9 here")


def with_files(**files: Path) -> str:
    return '[tls]\npeers = ["*"]\n' + "".join(f'{key} = "{path}"\n' for key, path in files.items())


def test_what_is_refused_at_start(hosts: Hosts, tmp_path: Path) -> None:
    """Each with the file that says so, the key there, its value, and what is wrong with that."""
    wide, short, none = (tmp_path / name for name in ("wide", "short", "none"))
    wide.write_text(f"pair:{KEY}\n")
    wide.chmod(0o644)
    secret(short, "pair:0011\n")
    der = tmp_path / "ca.der"
    der.write_bytes(ssl.PEM_cert_to_DER_cert(hosts.dst.ca.read_text()))
    good, other = hosts.dst._asdict(), hosts.src
    for settings, place, why in (
        ('tls = "require"\n', '[network] tls = "require"', "sources that come to 127.0.0.1 need TLS, and [tls] has"),
        (f'[tls]\npsk = "{hosts.psk}"\n', "[tls] peers = []", "nobody could come; name who may: "),
        (with_files(psk=wide), f'[tls] psk = "{wide}"', f"mode 0644, owner {os.getuid()}: a key must be readable"),
        (with_files(psk=short), f'[tls] psk = "{short}"', "line 1: the key must have 32 to 128 hex digits"),
        (with_files(psk=none), f'[tls] psk = "{none}"', "No such file or directory"),
        (with_files(**good | {"ca": none}), f'[tls] ca = "{none}"', "No such file or directory"),
        (with_files(**good | {"ca": wide}), f'[tls] ca = "{wide}"', "no certificates in PEM"),
        (with_files(**good | {"key": other.key}), f'[tls] key = "{other.key}"', "not the key of the certificate: "),
        (with_files(**good | {"ca": der}), f'[tls] ca = "{der}"', "no text, as it has to be"),
        (with_files(**good | {"certificate": wide}), f'[tls] certificate = "{wide}"', "not a certificate in PEM"),
    ):
        with pytest.raises(ConfigError) as caught:
            admission_of(settings, "127.0.0.1")
        assert str(caught.value).startswith(f"/here/gmemd.toml: {place}: {why}")


@pytest.mark.parametrize("what", ["certificate", "key", "ca"])
def test_a_source_that_is_given_a_wrong_file(hosts: Hosts, tmp_path: Path, what: str) -> None:
    files = hosts.src._asdict() | {what: secret(tmp_path / "wrong", "nonsense")}
    with pytest.raises(ConfigError, match=f"^--{what} {tmp_path}/wrong: no.* in PEM"):
        Credentials(Files(**files), server=False)


def admission_of(settings: str, host: str) -> object:
    from gmemd import admission, config

    return admission.for_listener(config.parse("[network]\n" + settings, Path("/here/gmemd.toml")), host)


def test_plain_text_has_to_be_meant_twice(expect_log: Callable[[str], None]) -> None:
    assert admission_of("", "127.0.0.1") is None
    assert admission_of("", "::1") is None
    with pytest.raises(ConfigError, match=r"sources that come to 10\.0\.0\.1 need TLS"):
        admission_of("", "10.0.0.1")
    with pytest.raises(ConfigError, match="say plain_text_on_network = true, too"):
        admission_of('tls = "off"', "10.0.0.1")
    expect_log(r"WARNING gmemd\.admission: .* memory comes to 10\.0\.0\.1 as plain text, from whoever connects")
    assert admission_of('tls = "off"\nplain_text_on_network = true', "10.0.0.1") is None
