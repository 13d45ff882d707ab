"""The configuration file: what it may say, and what is said about what it may not."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmemd.address import Address
from gmemd.config import (
    HOMES,
    TABLES,
    Config,
    dump,
    format_size,
    load,
    parse,
    parse_size,
)
from gmemd.errors import ConfigError

DOCUMENTATION = Path(__file__).parent.parent / "docs/config.md"

VALID = """
[daemon]
socket = "/tmp/s"
socket_mode = "0600"
socket_group = "kvm"
[network]
listen = "[::1]:0"
heartbeat = 1
dead_after = 2.5
[paging]
populate = "recv"
poll_us = 0
checksum = false
[limits]
memory = "1g"
state = 4096
[trace]
directory = "/var/lib/gmemd/trace"
"""

MISTAKES = {
    "[network]\nhartbeat = 1": "[network] hartbeat: no such key; the nearest is heartbeat in [network]",
    "[paging]\nlisten = 1": "[paging] listen: no such key; the nearest is listen in [network]",
    "[netwrok]\nlisten = 1": "netwrok: no such table; the nearest is [network]",
    "populate = 1": "populate: no such table; the nearest is populate in [paging]",
    "network = 1": "network: must be a table, [network]",
    "[network]\nheartbeat = nan": "[network] heartbeat = NaN: must be a number of seconds from 0.01 to 10",
    "[network]\nheartbeat = true": "[network] heartbeat = true: must be a number of seconds from 0.01 to 10",
    "[network]\nheartbeat = 0.6": "[network] dead_after = 1.0: must be at least 2 times heartbeat",
    '[daemon]\nmetrics = "0.0.0.0:9575"': '[daemon] metrics = "0.0.0.0:9575": must be a path, or a loopback address',
    '[daemon]\nmetrics = "example.org:9575"': 'metrics = "example.org:9575": must be a path, or a loopback address',
    '[daemon]\nmetrics = "9575"': 'metrics = "9575": must be host:port',
    '[network]\nlisten = "::1:7"': '[network] listen = "::1:7": must be host:port, with',
    "[network]\nmax_connections = 0": "[network] max_connections = 0: must be a whole number from 1 to 65536",
    "[limits]\nregions = 1.0": "[limits] regions = 1.0: must be a whole number from 1 to 1024",
    "[limits]\nmigrations = true": "[limits] migrations = true: must be a whole number from 1 to 4096",
    '[limits]\nmemory = "5000T"': '[limits] memory = "5000T": must be a size from 4K to 4096T',
    "[limits]\nstate = -1": "[limits] state = -1: must be a size: ",
    '[limits]\nstate = "16MiB"': '[limits] state = "16MiB": must be a size: ',
    "[limits]\nstate = true": "[limits] state = true: must be a string",
    '[paging]\npopulate = "wirte"': '[paging] populate = "wirte": must be one of auto, write, recv, copy',
    "[paging]\nchecksum = 1": "[paging] checksum = 1: must be true or false",
    "[daemon]\nsocket_mode = 660": "[daemon] socket_mode = 660: must be a string, in quotes",
    '[daemon]\nsocket_mode = "0999"': '[daemon] socket_mode = "0999": must be permissions as an octal number',
    '[daemon]\nsocket = "gmemd.sock"': '[daemon] socket = "gmemd.sock": must be an absolute path',
    f'[daemon]\nsocket = "/{"é" * 60}"': "must be an absolute path of at most 107 bytes",
    '[daemon]\nsocket = "/a\\u0000b"': '[daemon] socket = "/a\\u0000b": must be a string',
    '[trace]\ndirectory = "here"': '[trace] directory = "here": must be an absolute path, or "" for none',
    "[trace]\ndirectory = 1979-05-27": '[trace] directory = "1979-05-27": must be a string',
    "[network": "(at end of document)",
    "vmms = 1": "vmms: must be a table, [vmms]",
    '[vmms]\n"web-*" = "vmm"': '[vmms] web-* = "vmm": must be a list of names, such as',
    '[tls]\ncertificate = "/c.pem"': "[tls] certificate, key and ca go together: key and ca must be given",
    '[tls]\ncrl = "/c.pem"': "[tls] crl is of certificates: certificate, key and ca must be given, too",
    '[daemon]\nsocket = "/run/gmemd/status.sock"': "[daemon] socket, status_socket and metrics: each needs a path",
    '[daemon]\nmetrics = "/run/gmemd/gmemd.sock"': "[daemon] socket, status_socket and metrics: each needs a path",
    '[tls]\npeers = "src"': '[tls] peers = "src": must be a list of names, such as',
    '[network]\ntls = "no"': '[network] tls = "no": must be one of auto, require, off',
    '[vmms]\n"a/b" = ["vmm"]': '[vmms] a/b = ["vmm"]: must be the name of a migration, with *',
}


def test_valid() -> None:
    config = parse(VALID)
    assert config.daemon.socket == Path("/tmp/s")
    assert config.daemon.socket_mode == 0o600
    assert config.network.listen == Address("::1", 0)
    assert (config.network.heartbeat, config.network.dead_after) == (1.0, 2.5)
    assert (config.paging.populate, config.paging.poll_us, config.paging.checksum) == ("recv", 0, False)
    assert (config.limits.memory, config.limits.state) == (1 << 30, 4096)
    assert config.trace.directory == Path("/var/lib/gmemd/trace")
    assert config.limits.migrations == Config().limits.migrations


@pytest.mark.parametrize(("document", "message"), MISTAKES.items())
def test_mistake_is_named(document: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "gmemd.toml"
    file.write_text(document)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)


def test_file_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmemd.config.DEFAULT_PATH", tmp_path / "default.toml")
    assert load() == Config()
    (tmp_path / "default.toml").write_text("[limits]\nregions = 3")
    assert load().limits.regions == 3
    with pytest.raises(ConfigError, match=r"other\.toml: No such file"):
        load(tmp_path / "other.toml")


def test_file_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path)
    (tmp_path / "latin1").write_bytes(b'[trace]\ndirectory = "/\xe9"')
    with pytest.raises(ConfigError, match="latin1: 'utf-8' codec can't decode"):
        load(tmp_path / "latin1")


def test_constructed_config_is_checked_too() -> None:
    with pytest.raises(ValueError, match="at least 2 times heartbeat"):
        replace(Config().network, dead_after=0.5)


@given(
    st.text(st.characters(exclude_categories=["C", "Z"]) | st.sampled_from(' "\\'), max_size=50),
    st.integers(0, 1 << 30),
    st.floats(0.02, 60),
    st.integers(0, 0o777),
    st.sampled_from([Address("::1", 1), Address("example.org", 65535)]),
)
def test_dump_is_read_back(text: str, size: int, seconds: float, mode: int, address: Address) -> None:
    default = Config()
    config = replace(
        default,
        daemon=replace(default.daemon, socket_group=text, socket_mode=mode, metrics=Address("::1", size % 65536)),
        network=replace(default.network, listen=address, heartbeat=0.01, dead_after=seconds),
        limits=replace(default.limits, state=size),
        trace=replace(default.trace, directory=Path("/" + text)),
        tls=replace(default.tls, peers=("a.example", text or "x"), psk=Path("/" + text)),
        sources={"db-?": (".example",)},
        vmms={"web-*": ("vmm", text or "x"), "a": ()},
    )
    assert parse(dump(config)) == config


@given(st.integers(0, 1 << 60))
def test_sizes(size: int) -> None:
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize("text", ["", "-1", "1.5G", "1GB", " 1", "1 G", "G", "٣", "1" * 21])
def test_not_a_size(text: str) -> None:
    with pytest.raises(ValueError, match="must be a size"):
        parse_size(text)


def test_key_names_are_unique() -> None:
    """Or a misplaced key could not be told where it belongs."""
    assert len(HOMES) == sum(len(fields(table)) for table in TABLES.values())


def test_documentation_lists_every_key_and_default() -> None:
    text = DOCUMENTATION.read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert example == dump(Config())
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(HOMES)
