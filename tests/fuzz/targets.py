"""The `_untrusted` functions of Python as targets: each takes any bytes, and raises only when something does not hold.

A target makes the outer layers (length, checksum, JSON) itself for some inputs, so that mutations reach the inner ones.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from gmemd import handoff, status, trace
from gmemd.callers import Caller
from gmemd.errors import DataError, GmemdError, HandoffError, LinkError, ProtocolError
from gmemd.migrate import runs, wire
from gmemd.migrate.state import Conversation, Phase, Role
from gmemd.native import crc32c
from gmemd.native.memory import Region
from gmemd.registry import Registry

Target = Callable[[bytes], None]

REGION_PAGES = 1000
REGIONS = (
    Region(offset=0, size=16 * 4096, page_size=4096, gpa=0, hva=4096, file=0, uffd=1),
    Region(offset=0, size=2 << 20, page_size=2 << 20, gpa=1 << 30, hva=1 << 30, file=1, uffd=1),
)
LONGEST_ERROR = 2000  # bytes: what a peer sends must not fill a log


def refused(error: GmemdError) -> None:
    """A refusal says something, and not too much."""
    assert 0 < len(str(error)) <= LONGEST_ERROR, len(str(error))


def framed(body: bytes) -> bytes:
    return wire.HEAD.pack(len(body), crc32c(body)) + body


# What the other end says, by the phase of the conversation, so that it goes on.
HELLO = wire.Hello("m", 0, b"", 1, True, [[0, REGION_PAGES, 12]])
WELCOME = wire.Welcome(1, bytes(wire.TOKEN_BYTES), True, False)
SAID: dict[Role, dict[Phase, wire.Message]] = {
    Role.SOURCE: {Phase.NEW: HELLO, Phase.SWITCHING: wire.Switch(0), Phase.SENDING: wire.Pushed()},
    Role.DESTINATION: {Phase.GREETED: WELCOME, Phase.JOINING: wire.Go(), Phase.PUSHED: wire.Go()},
}


def control_lane(data: bytes) -> None:
    """A stream of messages, however it is cut up, held to the conversation. Byte 0: who sends, in what pieces."""
    how, stream = data[0] if data else 0, data[1:]
    role, other = (Role.SOURCE, Role.DESTINATION)[:: 1 if how & 1 else -1]
    decoder, conversation = wire.Decoder(role.value), Conversation()
    if how & 2:
        stream = wire.preamble() + b"".join(framed(body) for body in stream.split(b"\xff\xfe"))
    piece = (len(stream) or 1, 1, 7, 100)[how >> 2 & 3]
    try:
        for at in range(0, len(stream), piece):
            decoder.receive(stream[at : at + piece])
            while (message := decoder.next_message_untrusted()) is not None:
                assert wire.decode_untrusted(wire.encode(message)[wire.HEAD.size :]) == message
                if said := SAID[other].get(conversation.phase):
                    conversation.step(other, said)
                conversation.step(role, message)
            assert 0 < decoder.wanted <= wire.HEAD.size + wire.MAX_MESSAGE
    except (ProtocolError, LinkError) as error:
        refused(error)


def message(data: bytes) -> None:
    """A message's body."""
    try:
        found = wire.decode_untrusted(data)
    except ProtocolError as error:
        refused(error)
    else:
        body = wire.encode(found)[wire.HEAD.size :]
        assert len(body) <= wire.MAX_MESSAGE + 64
        assert wire.decode_untrusted(body) == found


def coded_runs(data: bytes) -> None:
    """A set of pages."""
    start = int.from_bytes(data[:2], "little")
    try:
        found = runs.decode_untrusted(start, data[2:], REGION_PAGES)
    except ProtocolError as error:
        refused(error)
    else:
        end = 0
        for first, pages in found:
            assert end <= first < first + pages <= REGION_PAGES
            end = first + pages


def hand_off(data: bytes) -> None:
    """A VMM's hand-off at the destination, and its regions at the source. Byte 0: how many descriptors came."""
    count, text = data[0] % 8 if data else 0, data[1:]
    try:
        said = handoff.parse_untrusted(text)
    except HandoffError as error:
        refused(error)
        return
    with suppress(HandoffError):
        for region in handoff.regions_untrusted(said, count, handoff.REGION_KEYS):
            assert region.file < count
            assert region.pages > 0
    try:
        asked = handoff.receive_untrusted(said, count)
    except HandoffError as error:
        refused(error)
        return
    assert wire.valid_id(asked.migration)
    for region in asked.regions:
        assert max(region.file, region.uffd, region.bitmap or 0) < count
        assert 0 < region.size <= handoff.MAX_BYTES
        assert region.size % region.page_size == 0


def discard(data: bytes) -> None:
    """What a VMM takes out later."""
    try:
        found = handoff.ranges_untrusted(handoff.parse_untrusted(data).get("discard"), REGIONS)
    except HandoffError as error:
        refused(error)
    else:
        assert all(first >= 0 and 0 < pages <= REGIONS[region].pages - first for region, first, pages in found)


def status_request(data: bytes) -> None:
    """A line on the status socket."""
    json.dumps(status.answer_untrusted(data, Registry(1, 1), Caller(1, 1)))


def trace_file(data: bytes) -> None:
    """A trace. Byte 0: whether the checksums are made right."""
    text = mended(data[1:]) if data[:1] == b"\1" else data[1:]
    fd = os.memfd_create("trace")
    try:
        os.write(fd, text)
        with suppress(DataError), trace.TraceReader(Path(f"/proc/self/fd/{fd}")) as reader:
            sizes = [region.pages for region in reader.header.regions]
            assert all(fault.page < sizes[fault.region] for fault in reader)
            assert reader.damaged <= len(text)
    finally:
        os.close(fd)


def mended(data: bytes) -> bytes:
    """A header of JSON up to the first mark of a block, then blocks, with lengths and checksums as they should be."""
    text, *blocks = data.split(trace.MARK)
    head = trace.HEAD.pack(trace.MAGIC, trace.VERSION, len(text))
    out = head + trace.CRC.pack(crc32c(head + text)) + text
    for block in blocks:
        tick, code = block[:8].ljust(8, b"\0"), block[8 : 8 + trace.MAX_BLOCK - trace.CODE_AT]
        body = trace.COUNTS.pack(len(code), 0, int.from_bytes(tick, "little")) + code
        out += trace.MARK + trace.CRC.pack(crc32c(body)) + body
    return out


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (control_lane, message, coded_runs, hand_off, discard, status_request, trace_file)
}
