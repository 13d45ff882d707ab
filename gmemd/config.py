"""The configuration file: TOML in, frozen dataclasses out, and every mistake in it named.

A key is declared once, in the dataclass of its table: name, type, default and kind. The kind reads a value
from TOML, checks it and writes it back.
"""

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, get_type_hints

from gmemd.address import Address, is_loopback, parse_address
from gmemd.errors import ConfigError

DEFAULT_PATH = Path("/etc/gmemd/gmemd.toml")
UNITS = {"T": 1 << 40, "G": 1 << 30, "M": 1 << 20, "K": 1 << 10, "": 1}
MAX_SOCKET_PATH = 107  # sockaddr_un holds 108 bytes, the last of them NUL
HEARTBEATS_BEFORE_DEAD = 2  # one that comes late must not cut a healthy lane

T = TypeVar("T")
Rules = dict[str, tuple[str, ...]]  # a pattern of migrations' names, and who may


def parse_size(text: str) -> int:
    """The number of bytes that a text such as `64M` stands for, in powers of 1024. Raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,20})([KMGT]?)", text.upper())
    if match is None:
        raise ValueError("must be a size: a number of bytes, or one with K, M, G or T, such as 64M")
    return int(match[1]) * UNITS[match[2]]


def format_size(size: int) -> str:
    """The shortest text that `parse_size` reads as exactly `size` bytes."""
    unit = next(unit for unit in UNITS if size % UNITS[unit] == 0) if size else ""
    return f"{size // UNITS[unit]}{unit}"


def quote(value: object) -> str:
    """A TOML string. For printable text, JSON has the same rules."""
    return json.dumps(str(value), ensure_ascii=False)


DEFAULT_LISTEN = Address("127.0.0.1", 7575)


@dataclass(frozen=True)
class Kind(Generic[T]):
    """One kind of value. `read` raises ValueError that says what the value must be."""

    read: Callable[[object], T]
    write: Callable[[T], str] = quote


def whole(low: int, high: int) -> Kind[int]:
    def read(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return value

    return Kind(read, str)


def seconds(low: float, high: float) -> Kind[float]:
    def read(value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"must be a number of seconds from {low} to {high}")
        return float(value)

    return Kind(read, str)


def boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def text(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError("must be a string, in quotes, of printable characters")
    return value


def choice(*names: str) -> Kind[str]:
    def read(value: object) -> str:
        if value not in names:
            raise ValueError("must be one of " + ", ".join(names))
        return text(value)

    return Kind(read)


def size(low: str, high: str) -> Kind[int]:
    def read(value: object) -> int:
        parsed = parse_size(str(value) if type(value) is int else text(value))
        if not parse_size(low) <= parsed <= parse_size(high):
            raise ValueError(f"must be a size from {low} to {high}")
        return parsed

    return Kind(read, lambda value: quote(format_size(value)))


def socket_path(value: object) -> Path:
    path = text(value)
    if not path.startswith("/") or len(path.encode()) > MAX_SOCKET_PATH:
        raise ValueError(f"must be an absolute path of at most {MAX_SOCKET_PATH} bytes")
    return Path(path)


def directory(value: object) -> Path | None:
    path = text(value)
    if path and not path.startswith("/"):
        raise ValueError('must be an absolute path, or "" for none')
    return Path(path) if path else None


def near(value: object) -> Path | Address | None:
    """Where only this host reaches: there is nothing that would check who asks."""
    where = text(value)
    if not where:
        return None
    if where.startswith("/"):
        return socket_path(where)
    address = parse_address(where)
    if not is_loopback(address.host):
        raise ValueError("must be a path, or a loopback address with its port, such as 127.0.0.1:9575")
    return address


def mode(value: object) -> int:
    if re.fullmatch("0?[0-7]{3}", text(value)) is None:
        raise ValueError("must be permissions as an octal number, such as 0660")
    return int(text(value), 8)


def names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) and name.isprintable() and name for name in value):
        raise ValueError('must be a list of names, such as ["vmm-a", "vmm-b"]')
    return tuple(value)


def pattern(key: str) -> str:
    """What stands for some migrations' names. Raises ValueError."""
    if re.fullmatch(r"[\w.*?-]{1,64}", key, re.ASCII) is None:
        raise ValueError("must be the name of a migration, with * for any letters and ? for any one")
    return key


SOCKET_PATH = Kind(socket_path)
DIRECTORY = Kind(directory, lambda path: quote(path or ""))
FILE = DIRECTORY
MODE = Kind(mode, lambda bits: quote(f"{bits:04o}"))
NAMES = Kind(names, lambda who: f"[{', '.join(map(quote, who))}]")
FLAG = Kind(boolean, lambda value: str(value).lower())
TEXT = Kind(text)
NEAR = Kind(near, lambda where: quote(where or ""))
ADDRESS = Kind(lambda value: parse_address(text(value)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Daemon:
    """The daemon's sockets on this host, where no socket unit hands them in. The group "" changes nothing, and
    `metrics` is None for nowhere."""

    socket: Annotated[Path, SOCKET_PATH] = Path("/run/gmemd/gmemd.sock")
    status_socket: Annotated[Path, SOCKET_PATH] = Path("/run/gmemd/status.sock")
    socket_mode: Annotated[int, MODE] = 0o660
    socket_group: Annotated[str, TEXT] = ""
    metrics: Annotated[Path | Address | None, NEAR] = None

    def __post_init__(self) -> None:
        if self.status_socket == self.socket or self.metrics in (self.socket, self.status_socket):
            where = f"{self.socket}, {self.status_socket}, {self.metrics or '(nowhere)'}"
            raise ValueError(f"socket, status_socket and metrics: each needs a path of its own, not {where}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """How sources reach the daemon, and when they are taken to be gone. Times in seconds."""

    listen: Annotated[Address, ADDRESS] = DEFAULT_LISTEN
    heartbeat: Annotated[float, seconds(0.01, 10)] = 0.3
    dead_after: Annotated[float, seconds(0.02, 60)] = 1.0
    max_connections: Annotated[int, whole(1, 65536)] = 256
    max_connections_of_peer: Annotated[int, whole(1, 65536)] = 192
    handshake_timeout: Annotated[float, seconds(0.1, 300)] = 10.0
    tls: Annotated[Literal["auto", "require", "off"], choice("auto", "require", "off")] = "auto"
    plain_text_on_network: Annotated[bool, FLAG] = False

    def __post_init__(self) -> None:
        if self.dead_after < HEARTBEATS_BEFORE_DEAD * self.heartbeat:
            raise ValueError(
                f"dead_after = {self.dead_after}: must be at least {HEARTBEATS_BEFORE_DEAD} times"
                f" heartbeat, which is {self.heartbeat}"
            )


def check_files(pem: Mapping[str, Path | None], crl: Path | None, prefix: str = "") -> None:
    """Raises ValueError where one file of `pem`, which is named with `prefix`, is given without the others."""
    names = [f"{prefix}{name}" for name in pem]
    missing = [name for name, path in zip(names, pem.values(), strict=True) if path is None]
    together = f"{', '.join(names[:-1])} and {names[-1]}"
    if 0 < len(missing) < len(names):
        raise ValueError(f"{together} go together: {' and '.join(missing)} must be given, too")
    if crl and missing:
        raise ValueError(f"{prefix}crl is of certificates: {together} must be given, too")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tls:
    """Who we are on the network, and which peers may come."""

    certificate: Annotated[Path | None, FILE] = None
    key: Annotated[Path | None, FILE] = None
    ca: Annotated[Path | None, FILE] = None
    crl: Annotated[Path | None, FILE] = None
    psk: Annotated[Path | None, FILE] = None
    peers: Annotated[tuple[str, ...], NAMES] = ()
    ktls: Annotated[bool, FLAG] = True

    def __post_init__(self) -> None:
        check_files({"certificate": self.certificate, "key": self.key, "ca": self.ca}, self.crl)


@dataclass(frozen=True, kw_only=True, slots=True)
class Paging:
    """How pages get into memory. `poll_us` in microseconds; 0 `lane_threads` is one per CPU."""

    populate: Annotated[Literal["auto", "write", "recv", "copy"], choice("auto", "write", "recv", "copy")] = "auto"
    poll_us: Annotated[int, whole(0, 1000)] = 100  # waking a thread takes less than a millisecond
    lane_threads: Annotated[int, whole(0, 256)] = 0
    checksum: Annotated[bool, FLAG] = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What the daemon takes on at most. `memory` and `state` in bytes, of one guest."""

    migrations: Annotated[int, whole(1, 4096)] = 64
    migrations_of_user: Annotated[int, whole(1, 4096)] = 64
    regions: Annotated[int, whole(1, 1024)] = 64  # more do not fit into a hand-off message of 128 KiB
    memory: Annotated[int, size("4K", "4096T")] = 16 << 40  # x86-64 addresses end at 52 bits
    state: Annotated[int, size("0", "1G")] = 16 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """Where faults are recorded, if anywhere, how many bytes a migration may write there, and whether their stages are,
    too."""

    directory: Annotated[Path | None, DIRECTORY] = None
    max_bytes: Annotated[int, size("64K", "1T")] = 64 << 20
    stages: Annotated[bool, FLAG] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The whole configuration: an attribute for each table, and the file that it is from."""

    daemon: Daemon = Daemon()
    network: Network = Network()
    tls: Tls = Tls()
    paging: Paging = Paging()
    limits: Limits = Limits()
    trace: Trace = Trace()
    sources: Rules = field(default_factory=dict)
    vmms: Rules = field(default_factory=dict)
    file: Path = field(default=DEFAULT_PATH, compare=False)

    def place(self, table: str, key: str) -> str:
        """Where a value stands, and what it is, for people."""
        values = getattr(self, table)
        written = NAMES.write(values[key]) if table in RULES else KINDS[table][key].write(getattr(values, key))
        return f"{self.file}: [{table}] {key} = {written}"

    def wrong(self, table: str, key: str, why: str) -> ConfigError:
        """What to raise of a value that is a good one of its kind, but not on this host."""
        return ConfigError(f"{self.place(table, key)}: {why}")


# Tables whose keys are patterns of migrations' names.
RULES = ("sources", "vmms")
NO_TABLES = (*RULES, "file")
TABLES: dict[str, type] = {name: hint for name, hint in get_type_hints(Config).items() if name not in NO_TABLES}
KINDS: dict[str, dict[str, Kind[Any]]] = {
    table: {key: hint.__metadata__[0] for key, hint in get_type_hints(cls, include_extras=True).items()}
    for table, cls in TABLES.items()
}
HOMES = {key: table for table, kinds in KINDS.items() for key in kinds}


def load(path: Path | None = None) -> Config:
    """Reads a configuration file; None means the default one, which may be absent. Raises ConfigError."""
    file = path or DEFAULT_PATH
    try:
        return parse(file.read_bytes().decode(), file)
    except OSError as error:
        if path is None and isinstance(error, FileNotFoundError):
            return Config(file=file)
        raise ConfigError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from None


def parse(document: str, file: Path = DEFAULT_PATH) -> Config:
    """The configuration in a TOML document. Raises ValueError that names table, key, value and rule."""
    tables: dict[str, Any] = {}
    for name, values in tomllib.loads(document).items():
        if name not in TABLES and name not in RULES:
            raise ValueError(f"{name}: no such table; {nearest(name, [*TABLES, *RULES, *HOMES])}")
        if not isinstance(values, dict):
            raise ValueError(f"{name}: must be a table, [{name}]")
        try:
            tables[name] = dict(read_rules(values)) if name in RULES else TABLES[name](**dict(read_keys(name, values)))
        except ValueError as error:
            raise ValueError(f"[{name}] {error}") from None
    return Config(**tables, file=file)


def read_keys(table: str, values: dict[str, object]) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if key not in KINDS[table]:
            raise ValueError(f"{key}: no such key; {nearest(key, list(HOMES))}")
        try:
            yield key, KINDS[table][key].read(value)
        except ValueError as error:
            shown = json.dumps(value, default=str, ensure_ascii=False)
            raise ValueError(f"{key} = {shown}: {error}") from None


def read_rules(values: dict[str, object]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for key, value in values.items():
        try:
            yield pattern(key), NAMES.read(value)
        except ValueError as error:
            raise ValueError(f"{key} = {json.dumps(value, default=str, ensure_ascii=False)}: {error}") from None


def nearest(name: str, known: list[str]) -> str:
    """Helps whoever mistyped a name, or put it into the wrong table."""
    (close,) = get_close_matches(name, known, n=1, cutoff=0.0)
    return f"the nearest is {close} in [{HOMES[close]}]" if close in HOMES else f"the nearest is [{close}]"


def dump(config: Config) -> str:
    """The configuration as TOML, every key of it. `parse` reads it back as the same."""
    keys = {table: "".join(dump_keys(table, getattr(config, table))) for table in TABLES}
    rules = {table: "".join(dump_rules(getattr(config, table))) for table in RULES}
    return "\n".join(f"[{table}]\n{lines}" for table, lines in (keys | rules).items())


def dump_keys(table: str, values: object) -> Iterator[str]:
    for key, kind in KINDS[table].items():
        yield f"{key} = {kind.write(getattr(values, key))}\n"


def dump_rules(rules: Rules) -> Iterator[str]:
    for key, who in rules.items():
        yield f"{quote(key)} = {NAMES.write(who)}\n"
