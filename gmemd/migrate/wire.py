"""The bytes of the control lane, and of every lane's hand-shake, without any I/O. docs/protocol.md is the
specification.

Each direction of a connection begins with a preamble of 8 bytes, which names the protocol and its version. After it
come messages: a length of 4 bytes, little-endian, the CRC-32C of the rest, and a msgpack map. Page lanes turn to
frames (gmemd/native/frame.h) once their hello has been answered.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from reprlib import repr as short  # and not as deep as it may be
from typing import ClassVar, TypeGuard

import msgpack

from gmemd.errors import LinkError, ProtocolError
from gmemd.native import crc32c

VERSION = 1
PREAMBLE = struct.Struct("<6sH")
MAGIC = b"GMEMD\0"
HEAD = struct.Struct("<II")  # length of the body, and its CRC-32C

# How a hand-shake and an alert of TLS begin.
TLS_RECORDS = (b"\x16\x03", b"\x15\x03")

# The longest message is a piece of the VMM's state, or of coded runs.
MAX_MESSAGE = 128 * 1024
# A piece of the VMM's state.
STATE_PIECE = 64 * 1024
MAX_ID = 63
MAX_TEXT = 1024
MAX_REGIONS = 1024
# The urgent lane is 0; as many background lanes as the native side has room for.
MAX_LANES = 15
MAX_EPOCH = 2**48
TOKEN_BYTES = 16
# Digests of one message, 64 KiB.
DIGESTS = 16 * 1024
DIGEST_BYTES = 4

Check = Callable[[object], bool]


def _integer(low: int, high: int) -> Check:
    return lambda value: type(value) is int and low <= value <= high


def _text(longest: int) -> Check:
    return lambda value: type(value) is str and len(value) <= longest


def _bytes(longest: int) -> Check:
    return lambda value: type(value) is bytes and len(value) <= longest


def _token(value: object) -> bool:
    return type(value) is bytes and len(value) == TOKEN_BYTES


def _truth(value: object) -> bool:
    return type(value) is bool


def valid_id(value: object) -> TypeGuard[str]:
    """Whether a value may name a migration: 1 to 63 of letters, digits and `-_.`."""
    return (
        type(value) is str
        and 0 < len(value) <= MAX_ID
        and value.isascii()
        and all(c.isalnum() or c in "-_." for c in value)
    )


_PAGES = _integer(1, 2**40)


def _regions(value: object) -> bool:
    return (
        type(value) is list
        and 0 < len(value) <= MAX_REGIONS
        and all(
            type(region) is list
            and len(region) == 3
            and _integer(0, 2**63)(region[0])
            and _PAGES(region[1])
            and _integer(12, 30)(region[2])
            for region in value
        )
    )


@dataclass(frozen=True, slots=True)
class Message:
    """What travels on a control lane. `CHECKS` has a test for each field."""

    CHECKS: ClassVar[Mapping[str, Check]] = {}


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """Source, first on every control lane: who it is, and each region's [gpa, pages, page shift].

    `epoch` and `token` are the last that this source was given, 0 and empty if none yet. `verify`: it wants pages to
    be compared after the end.
    """

    CHECKS: ClassVar[Mapping[str, Check]] = {
        "migration": valid_id,
        "epoch": _integer(0, MAX_EPOCH),
        "token": lambda value: value == b"" or _token(value),
        "lanes": _integer(1, MAX_LANES),
        "checksum": _truth,
        "regions": _regions,
        "verify": _truth,
    }
    migration: str
    epoch: int
    token: bytes
    lanes: int
    checksum: bool
    regions: list[list[int]]
    verify: bool = False


@dataclass(frozen=True, slots=True)
class Welcome(Message):
    """Destination, in answer: the epoch of this session and the secret that its page lanes show.

    `switched`: the guest runs at the destination already. `verify`: it will compare.
    """

    CHECKS: ClassVar[Mapping[str, Check]] = {
        "epoch": _integer(1, MAX_EPOCH),
        "token": _token,
        "checksum": _truth,
        "switched": _truth,
        "verify": _truth,
    }
    epoch: int
    token: bytes
    checksum: bool
    switched: bool
    verify: bool = False


@dataclass(frozen=True, slots=True)
class LaneHello(Message):
    """Source, first on a page lane: which session it belongs to. Lane 0 is the urgent one."""

    CHECKS: ClassVar[Mapping[str, Check]] = {
        "migration": valid_id,
        "epoch": _integer(1, MAX_EPOCH),
        "lane": _integer(0, MAX_LANES),
        "token": _token,
    }
    migration: str
    epoch: int
    lane: int
    token: bytes


@dataclass(frozen=True, slots=True)
class LaneWelcome(Message):
    """Destination: the lane is taken; frames from now on."""


@dataclass(frozen=True, slots=True)
class Waiting(Message):
    """Destination: no VMM has come for this migration yet. Also a sign of life."""


@dataclass(frozen=True, slots=True)
class Refused(Message):
    """Destination: no, and trying the same again does not help. The migration itself stays as it is."""

    CHECKS: ClassVar[Mapping[str, Check]] = {"why": _text(MAX_TEXT)}
    why: str


@dataclass(frozen=True, slots=True)
class Received(Message):
    """Destination: pages that are in place already, as coded runs."""

    CHECKS: ClassVar[Mapping[str, Check]] = {
        "region": _integer(0, MAX_REGIONS - 1),
        "start": _integer(0, 2**40),
        "runs": _bytes(MAX_MESSAGE),
    }
    region: int
    start: int
    runs: bytes


@dataclass(frozen=True, slots=True)
class Go(Message):
    """Destination: all that is received has been told; send the rest."""


@dataclass(frozen=True, slots=True)
class State(Message):
    """Source: a piece of the VMM's own state."""

    CHECKS: ClassVar[Mapping[str, Check]] = {"piece": _bytes(STATE_PIECE)}
    piece: bytes


@dataclass(frozen=True, slots=True)
class Switch(Message):
    """Source: the guest has stopped here, its state of `size` bytes has been sent; it runs at the destination from now
    on."""

    CHECKS: ClassVar[Mapping[str, Check]] = {"size": _integer(0, 2**32)}
    size: int


@dataclass(frozen=True, slots=True)
class Zero(Message):
    """Source: pages that are zero, as coded runs."""

    CHECKS: ClassVar[Mapping[str, Check]] = Received.CHECKS
    region: int
    start: int
    runs: bytes


@dataclass(frozen=True, slots=True)
class Pushed(Message):
    """Source: every page has been sent on some lane."""


@dataclass(frozen=True, slots=True)
class Beat(Message):
    """Either: this end is alive."""


@dataclass(frozen=True, slots=True)
class Complete(Message):
    """Destination: every page is in place."""

    CHECKS: ClassVar[Mapping[str, Check]] = {"pages": _integer(0, 2**44)}
    pages: int


@dataclass(frozen=True, slots=True)
class Digests(Message):
    """Source, after the end: the CRC-32C of each page from `first` on, little-endian, 1 in place of 0. All pages, in
    order."""

    CHECKS: ClassVar[Mapping[str, Check]] = {
        "region": _integer(0, MAX_REGIONS - 1),
        "first": _integer(0, 2**40),
        "digests": _bytes(DIGESTS * DIGEST_BYTES),
    }
    region: int
    first: int
    digests: bytes


@dataclass(frozen=True, slots=True)
class Verified(Message):
    """Destination, after the last of them: what came of it. `region` and `page` are of the first mismatch."""

    CHECKS: ClassVar[Mapping[str, Check]] = {
        "verified": _integer(0, 2**44),
        "left_out": _integer(0, 2**44),
        "mismatches": _integer(0, 2**44),
        "region": _integer(0, MAX_REGIONS - 1),
        "page": _integer(0, 2**40),
    }
    verified: int
    left_out: int
    mismatches: int
    region: int
    page: int


@dataclass(frozen=True, slots=True)
class Failed(Message):
    """Either: the migration ends here, for good."""

    CHECKS: ClassVar[Mapping[str, Check]] = {"why": _text(MAX_TEXT)}
    why: str


MESSAGES: dict[str, type[Message]] = {
    "hello": Hello,
    "welcome": Welcome,
    "lane": LaneHello,
    "lane-welcome": LaneWelcome,
    "waiting": Waiting,
    "refused": Refused,
    "received": Received,
    "go": Go,
    "state": State,
    "switch": Switch,
    "zero": Zero,
    "pushed": Pushed,
    "beat": Beat,
    "complete": Complete,
    "digests": Digests,
    "verified": Verified,
    "failed": Failed,
}
NAMES = {cls: name for name, cls in MESSAGES.items()}
# What an end of before these fields means by leaving them out.
DEFAULTS = {cls: {f.name: f.default for f in fields(cls) if f.default is not MISSING} for cls in NAMES}


def shown(value: object) -> str:
    """A peer's value, for an error message. Bytes may be a guest's, and are not shown."""
    return f"{len(value)} bytes" if isinstance(value, bytes) else short(value)


def preamble() -> bytes:
    """The first bytes of each direction."""
    return PREAMBLE.pack(MAGIC, VERSION)


def encode(message: Message) -> bytes:
    """A message with its head."""
    body: bytes = msgpack.packb(
        {"type": NAMES[type(message)]} | {f.name: getattr(message, f.name) for f in fields(message)}
    )
    return HEAD.pack(len(body), crc32c(body)) + body


def decode_untrusted(body: bytes) -> Message:
    """The message in a body; unknown keys are passed over, so that a later version may add some."""
    try:
        value = msgpack.unpackb(
            body,
            max_str_len=4 * MAX_TEXT,
            max_bin_len=MAX_MESSAGE,
            max_array_len=MAX_REGIONS,
            max_map_len=16,
            max_ext_len=0,
        )
    except Exception as error:
        raise ProtocolError(f"control lane: not msgpack: {error}") from None
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in MESSAGES:
        raise ProtocolError(f"control lane: a message of no known type: {shown(kind)}")
    cls = MESSAGES[kind]
    value = DEFAULTS[cls] | value
    for name, check in cls.CHECKS.items():
        if name not in value or not check(value[name]):
            raise ProtocolError(f"control lane: {kind}: bad {name}: {shown(value.get(name))}")
    return cls(**{name: value[name] for name in cls.CHECKS})


class Decoder:
    """Turns the bytes of a connection into messages, however they are cut up. `peer` is for error messages."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._buffer = bytearray()
        self._greeted = False

    def receive(self, data: bytes) -> None:
        """Takes bytes as they came."""
        self._buffer += data

    def next_message_untrusted(self) -> Message | None:
        """The next whole message, or None if more bytes are needed."""
        try:
            return self._next()
        except ProtocolError as error:
            raise ProtocolError(f"{error}: sent by the {self._peer}") from None

    def _next(self) -> Message | None:
        if not self._greeted:
            if self._buffer.startswith(TLS_RECORDS):
                raise ProtocolError("it speaks TLS, and we do not")
            if len(self._buffer) < PREAMBLE.size:
                return None
            magic, version = PREAMBLE.unpack_from(self._buffer)
            if magic != MAGIC:
                raise ProtocolError(f"not a gmemd connection: it begins with {magic!r}")
            if version != VERSION:
                raise ProtocolError(f"protocol version {version} (this is version {VERSION})")
            del self._buffer[: PREAMBLE.size]
            self._greeted = True
        if len(self._buffer) < HEAD.size:
            return None
        length, crc = HEAD.unpack_from(self._buffer)
        if length > MAX_MESSAGE:
            raise ProtocolError(f"control lane: a message of {length} bytes ({MAX_MESSAGE} at most)")
        if len(self._buffer) < HEAD.size + length:
            return None
        body = bytes(self._buffer[HEAD.size : HEAD.size + length])
        del self._buffer[: HEAD.size + length]
        if crc32c(body) != crc:
            raise LinkError("control lane: a message was damaged on the way")
        return decode_untrusted(body)

    @property
    def wanted(self) -> int:
        """Bytes that the next step takes: who reads no more leaves what follows a message to somebody else."""
        if not self._greeted:
            return PREAMBLE.size - len(self._buffer)
        if len(self._buffer) < HEAD.size:
            return HEAD.size - len(self._buffer)
        return HEAD.size + int(HEAD.unpack_from(self._buffer)[0]) - len(self._buffer)

    @property
    def pending(self) -> bool:
        """Whether a message has come in part."""
        return bool(self._buffer)
