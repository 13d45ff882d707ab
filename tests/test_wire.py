"""The bytes of the control lane: what goes in comes out, however it is cut up; anything else is refused by name."""

import re
import tracemalloc
from collections.abc import Iterator
from dataclasses import fields

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import messages

from gmemd.errors import LinkError, ProtocolError
from gmemd.migrate import wire
from gmemd.native import crc32c

PEER = "source"


def framed(body: bytes) -> bytes:
    """A body with a right head."""
    return wire.HEAD.pack(len(body), crc32c(body)) + body


def stream(*sent: wire.Message) -> bytes:
    """One direction of a connection, from its beginning."""
    return wire.preamble() + b"".join(map(wire.encode, sent))


def decoded(*chunks: bytes) -> Iterator[wire.Message]:
    decoder = wire.Decoder(PEER)
    for chunk in chunks:
        decoder.receive(chunk)
        while (message := decoder.next_message_untrusted()) is not None:
            yield message


def outcome(*chunks: bytes) -> tuple[list[wire.Message], str]:
    """The messages that come out, and the error that ends them, if one does."""
    got: list[wire.Message] = []
    try:
        for message in decoded(*chunks):
            got.append(message)
    except (ProtocolError, LinkError) as error:
        return got, f"{type(error).__name__}: {error}"
    return got, ""


def one_by_one(data: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in data]


def test_every_message_has_a_strategy_and_a_check_for_each_field() -> None:
    assert messages.BY_TYPE.keys() == set(wire.MESSAGES.values())
    for kind in wire.MESSAGES.values():
        assert set(kind.CHECKS) == {field.name for field in fields(kind)}


@given(st.lists(messages.ANY, max_size=5), st.data())
def test_messages_come_out_as_they_went_in(sent: list[wire.Message], data: st.DataObject) -> None:
    whole = stream(*sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=9)))
    chunks = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert list(decoded(*chunks)) == sent
    assert list(decoded(*one_by_one(whole))) == sent


@pytest.mark.parametrize("kind", wire.MESSAGES.values(), ids=lambda kind: wire.NAMES[kind])
def test_the_largest_of_each_kind_fits(kind: type[wire.Message]) -> None:
    largest = {
        "migration": "m" * wire.MAX_ID,
        "epoch": wire.MAX_EPOCH,
        "lane": wire.MAX_LANES,
        "lanes": wire.MAX_LANES,
        "token": bytes(wire.TOKEN_BYTES),
        "checksum": True,
        "switched": True,
        "verify": True,
        "regions": [[2**63, 2**40, 30]] * wire.MAX_REGIONS,
        "why": "\U0001f427" * wire.MAX_TEXT,
        "region": wire.MAX_REGIONS - 1,
        "start": 2**40,
        "runs": bytes(wire.MAX_MESSAGE - 1024),
        "piece": bytes(wire.STATE_PIECE),
        "size": 2**32,
        "pages": 2**44,
        "first": 2**40,
        "digests": bytes(wire.DIGESTS * wire.DIGEST_BYTES),
        "verified": 2**44,
        "left_out": 2**44,
        "mismatches": 2**44,
        "page": 2**40,
    }
    message = kind(**{name: largest[name] for name in kind.CHECKS})
    assert list(decoded(stream(message))) == [message]


@given(st.sampled_from([b"", wire.preamble()]), st.binary(max_size=300))
def test_random_bytes_give_nothing_or_an_error_of_ours(begin: bytes, data: bytes) -> None:
    assert outcome(begin + data) == outcome(begin, *one_by_one(data))


@given(st.binary(max_size=200))
def test_random_bytes_behind_a_right_head(body: bytes) -> None:
    """The checksum is no obstacle to somebody who means harm."""
    got, error = outcome(wire.preamble() + framed(body))
    assert (len(got) == 1) is (error == "")
    assert error == "" or re.fullmatch("(?s)ProtocolError: .* sent by the source", error)


NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=9) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=9,
)


@given(st.sampled_from(list(wire.MESSAGES)), st.data())
def test_a_field_of_any_other_kind_is_refused_by_name(kind: str, data: st.DataObject) -> None:
    cls = wire.MESSAGES[kind]
    message = data.draw(messages.BY_TYPE[cls])
    values = {"type": kind} | {name: getattr(message, name) for name in cls.CHECKS}
    if not cls.CHECKS:
        return
    name = data.draw(st.sampled_from(list(cls.CHECKS)))
    values[name] = data.draw(VALUES)
    got, error = outcome(wire.preamble() + framed(msgpack.packb(values)))
    if error:
        assert error.startswith(f"ProtocolError: control lane: {kind}: bad {name}: ")
    else:
        assert wire.encode(got[0]) == framed(msgpack.packb(values))


@given(st.lists(messages.ANY, min_size=1, max_size=4), st.data())
def test_a_flipped_bit_is_found(sent: list[wire.Message], data: st.DataObject) -> None:
    whole = bytearray(stream(*sent))
    at = data.draw(st.integers(0, 8 * len(whole) - 1))
    whole[at // 8] ^= 1 << at % 8
    got, error = outcome(bytes(whole))
    assert got == sent[: len(got)]
    assert len(got) < len(sent)
    assert error or len(got) < len(sent)  # a length that has grown waits for more


@given(st.lists(messages.ANY, max_size=4), st.data())
def test_inserted_and_missing_bytes_never_give_another_message(sent: list[wire.Message], data: st.DataObject) -> None:
    whole = stream(*sent)
    at = data.draw(st.integers(0, len(whole)))
    gone = data.draw(st.integers(0, len(whole) - at))
    other = whole[:at] + data.draw(st.binary(max_size=40)) + whole[at + gone :]
    got, error = outcome(other)
    intact = [message for message, end in zip(sent, ends(sent), strict=True) if end <= at]
    assert got[: len(intact)] == intact
    assert outcome(*one_by_one(other)) == (got, error)


def ends(sent: list[wire.Message]) -> Iterator[int]:
    at = wire.PREAMBLE.size
    for message in sent:
        at += len(wire.encode(message))
        yield at


def test_keys_of_a_later_version_are_passed_over() -> None:
    body = msgpack.packb({"type": "complete", "pages": 7, "in": 9.5, "later": ["versions"]})
    assert list(decoded(wire.preamble() + framed(body))) == [wire.Complete(7)]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"GET / HTTP/1.1\r\n", r"not a gmemd connection: it begins with b'GET / '"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01", "it speaks TLS, and we do not"),
        (b"\x15\x03\x01\x00\x02\x02\x46", "it speaks TLS, and we do not"),
        (wire.PREAMBLE.pack(wire.MAGIC, 2), "protocol version 2 (this is version 1)"),
        (wire.preamble() + wire.HEAD.pack(wire.MAX_MESSAGE + 1, 0), "a message of 131073 bytes (131072 at most)"),
        (wire.preamble() + wire.HEAD.pack(2**32 - 1, 0), "a message of 4294967295 bytes (131072 at most)"),
        (wire.preamble() + framed(b""), "not msgpack"),
        (wire.preamble() + framed(b"\xc1"), "not msgpack"),
        (wire.preamble() + framed(b"\x80\x80"), "not msgpack"),
        (wire.preamble() + framed(b"\x90"), "a message of no known type: None"),
        (wire.preamble() + framed(msgpack.packb({"type": "helo"})), "a message of no known type: 'helo'"),
        (wire.preamble() + framed(msgpack.packb({"type": ["go"]})), "a message of no known type: ['go']"),
        (wire.preamble() + framed(msgpack.packb({1: 2})), "not msgpack"),
        (wire.preamble() + framed(msgpack.packb({"type": "refused"})), "refused: bad why: None"),
        (wire.preamble() + framed(msgpack.packb({str(n): n for n in range(17)})), "not msgpack"),
        (wire.preamble() + framed(msgpack.packb({"type": "go", "x": [0] * 1025})), "not msgpack"),
        (wire.preamble() + framed(msgpack.packb({"type": "go", "x": "x" * 4097})), "not msgpack"),
        (wire.preamble() + framed(msgpack.packb({"type": "go", "x": msgpack.ExtType(5, b"x")})), "not msgpack"),
    ],
)
def test_wrong_bytes_are_told_and_by_whom(data: bytes, error: str) -> None:
    got, told = outcome(data)
    assert got == []
    assert told.startswith("ProtocolError: ")
    assert error in told
    assert told.endswith(": sent by the source")


@pytest.mark.parametrize("depth", [1, 50, 500, 900, 1000, 1022, 1023, 1024, 5000])
@pytest.mark.parametrize("key", ["type", "why"])
def test_nesting_is_no_weapon(key: str, depth: int) -> None:
    """Neither msgpack's stack nor Python's, which would end the daemon and not the connection."""
    values = {"type": b"\xa7refused", "why": b"\xa0"} | {key: b"\x91" * depth + b"\x00"}
    body = b"\x82" + b"".join(msgpack.packb(name) + value for name, value in values.items())
    got, error = outcome(wire.preamble() + framed(body))
    assert got == []
    assert error.startswith("ProtocolError: control lane: ")
    assert len(error) < 300


def test_damage_on_the_way_is_the_links_fault() -> None:
    whole = bytearray(stream(wire.Beat()))
    whole[-1] ^= 1
    assert outcome(bytes(whole)) == ([], "LinkError: control lane: a message was damaged on the way")


@given(st.lists(messages.ANY, min_size=1, max_size=4))
def test_who_reads_what_is_wanted_reads_no_further(sent: list[wire.Message]) -> None:
    whole, at = stream(*sent), 0
    decoder = wire.Decoder(PEER)
    for message, end in zip(sent, ends(sent), strict=True):
        while (got := decoder.next_message_untrusted()) is None:
            wanted = decoder.wanted
            assert 0 < wanted <= wire.HEAD.size + wire.MAX_MESSAGE
            decoder.receive(whole[at : at + wanted])
            at += wanted
        assert (got, at) == (message, end)
        assert not decoder.pending


BOMBS = {
    "a body that never ends": wire.HEAD.pack(wire.MAX_MESSAGE, 0) + bytes(wire.MAX_MESSAGE - 1),
    "empty lists in lists": framed((b"\xdc\x04\x00" + b"\x90" * 1024) * 127),
    "an announced list of 2^32": framed(b"\xdd\xff\xff\xff\xff"),
    "an announced map of 2^32": framed(b"\xdf\xff\xff\xff\xff"),
    "announced bytes of 2^32": framed(b"\xc6\xff\xff\xff\xff"),
    "lists of lists of lists": framed(b"\x82\xa4type\xa7refused\xa3why" + b"\xdc\x04\x00" * 1000),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_memory_for_a_peer_is_bounded(bomb: bytes) -> None:
    tracemalloc.start()
    try:
        outcome(wire.preamble() + bomb)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 128 * wire.MAX_MESSAGE
