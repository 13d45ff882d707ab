"""Streams of messages and control lanes over connections in memory, which end, are slow, or lie."""

import socket
import time
from contextlib import ExitStack
from typing import cast

import pytest
import trio
import trio.testing

from gmemd.errors import LinkError, ProtocolError
from gmemd.migrate import wire
from gmemd.migrate.link import ControlLane, MessageStream, connect
from gmemd.migrate.state import Role

S, D = Role.SOURCE, Role.DESTINATION
HELLO = wire.Hello("m", 0, b"", 1, True, [[0, 1, 12]])
WELCOME = wire.Welcome(1, bytes(16), True, False)
FRAME = b"the first frame"
Pair = tuple[MessageStream, trio.abc.HalfCloseableStream]


@pytest.fixture
def pair() -> Pair:
    """A destination's stream of messages, and the source's bare end."""
    ours, theirs = trio.testing.memory_stream_pair()
    return MessageStream(cast(trio.SocketStream, ours), S, "somewhere"), theirs


@pytest.mark.parametrize("sent", range(1, len(wire.preamble() + wire.encode(wire.Go()))))
async def test_the_end_comes_in_the_middle(pair: Pair, sent: int) -> None:
    messages, theirs = pair
    await theirs.send_all((wire.preamble() + wire.encode(wire.Go()))[:sent])
    await theirs.send_eof()
    where = "" if sent == wire.PREAMBLE.size else " in the middle of a message"
    with pytest.raises(LinkError, match=f"^somewhere: connection closed{where}$"):
        await messages.receive()


async def test_the_end_comes_behind_a_message(pair: Pair) -> None:
    messages, theirs = pair
    await theirs.send_all(wire.preamble() + wire.encode(wire.Go()))
    await theirs.aclose()
    assert await messages.receive() == wire.Go()
    with pytest.raises(LinkError, match=r"^somewhere: connection closed$"):
        await messages.receive()


async def test_a_length_that_was_damaged_on_the_way(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats come, and fill up a message that nobody sent."""
    messages, theirs = pair
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    beat = wire.encode(wire.Beat())
    await theirs.send_all(wire.preamble() + wire.HEAD.pack(100_000, 0))

    async def trickle() -> None:
        nonlocal now
        while now < 100:
            await theirs.send_all(beat)
            await trio.testing.wait_all_tasks_blocked()
            now += 0.3

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trickle)
        with pytest.raises(LinkError, match=r"^somewhere: a message does not end in 5 s$"):
            await messages.receive()
        nursery.cancel_scope.cancel()
    assert 5 < now < 6


async def test_slowly_byte_by_byte(pair: Pair, autojump_clock: trio.testing.MockClock) -> None:
    messages, theirs = pair

    async def dribble() -> None:
        for byte in wire.preamble() + wire.encode(HELLO):
            await trio.sleep(0.1)
            await theirs.send_all(bytes([byte]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(dribble)
        assert await messages.receive() == HELLO
    assert autojump_clock.current_time() > 0.09 * len(wire.preamble() + wire.encode(HELLO))


async def test_damage_and_nonsense(pair: Pair) -> None:
    messages, theirs = pair
    damaged = bytearray(wire.encode(wire.Go()))
    damaged[-1] ^= 1
    await theirs.send_all(wire.preamble() + damaged)
    with pytest.raises(LinkError, match="a message was damaged on the way"):
        await messages.receive()
    await theirs.send_all(wire.HEAD.pack(2**31, 0))
    with pytest.raises(ProtocolError, match=r"2147483648 bytes .*: sent by the source$"):
        await messages.receive()


async def test_nobody_reads(pair: Pair) -> None:
    messages, theirs = pair
    await theirs.aclose()
    with pytest.raises(LinkError, match=r"^somewhere: "):
        await messages.send(wire.Beat())


async def test_our_own_end_is_closed(pair: Pair) -> None:
    messages, _ = pair
    await messages.stream.aclose()
    for call in (messages.receive(), messages.send(wire.Beat()), messages.send_last(wire.Beat())):
        with pytest.raises(LinkError, match=r"^somewhere: "):
            await call


async def test_messages_of_several_tasks_do_not_mix() -> None:
    ours, theirs = trio.testing.lockstep_stream_pair()
    sender = MessageStream(cast(trio.SocketStream, ours), S, "")
    receiver = MessageStream(cast(trio.SocketStream, theirs), D, "")
    sent = [wire.State(bytes([number]) * 50_000) for number in range(9)]
    async with trio.open_nursery() as nursery:
        for message in sent:
            nursery.start_soon(sender.send, message)
        got = [await receiver.receive() for _ in sent]
    assert sorted(got, key=repr) == sent


async def test_the_last_word_is_waited_for(pair: Pair, autojump_clock: trio.testing.MockClock) -> None:
    messages, theirs = pair

    async def hang_up_late() -> None:
        await trio.sleep(3.0)
        await theirs.send_all(b"a beat that nobody reads")
        await trio.sleep(2.0)
        await theirs.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(hang_up_late)
        await messages.send_last(wire.Refused("no"))
        assert autojump_clock.current_time() == 5.0


async def test_both_ends_of_a_control_lane_are_held_to_the_conversation() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    source = ControlLane(MessageStream(cast(trio.SocketStream, ours), D, ""), S)
    destination = ControlLane(MessageStream(cast(trio.SocketStream, theirs), S, ""), D)
    await source.send(HELLO)
    assert await destination.receive() == HELLO
    with pytest.raises(ProtocolError, match="switch while greeted: sent by the source"):
        await source.send(wire.Switch(0))
    with trio.move_on_after(0):
        await destination.receive()
        pytest.fail("what may not be said was sent")
    await source.messages.send(wire.Switch(0))  # by one that does not look
    with pytest.raises(ProtocolError, match="switch while greeted: sent by the source"):
        await destination.receive()
    await destination.send(WELCOME)
    assert await source.receive() == WELCOME
    await destination.messages.send(wire.Complete(1))
    with pytest.raises(ProtocolError, match="complete while joining: sent by the destination"):
        await source.receive()


async def test_silence_counts_from_when_signs_of_life_are_due(pair: Pair) -> None:
    messages, _ = pair
    control = ControlLane(messages, D)
    messages.heard -= 1000
    assert control.silent_for > 999
    control.expect_signs_of_life()
    assert control.silent_for < 1


async def test_frames_behind_a_hello_are_left_to_the_lane() -> None:
    """The socket as the native side gets it: the first of what follows, and nothing short of it."""
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    port = listener.socket.getsockname()[1]
    async with listener, await trio.open_tcp_stream("127.0.0.1", port) as theirs, await listener.accept() as ours:
        await theirs.send_all(wire.preamble() + wire.encode(wire.LaneWelcome()) + FRAME)
        messages = MessageStream(ours, D, "")
        assert await messages.receive() == wire.LaneWelcome()
        assert await messages.take_socket().recv(1 << 16) == FRAME


async def test_a_connection_that_nobody_takes() -> None:
    """As with a host that drops what is sent to it: it is not waited for longer than is said."""
    with socket.socket() as listener, ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        for _ in range(4):  # more than the queue holds
            early = stack.enter_context(socket.socket())
            early.setblocking(False)
            early.connect_ex(("127.0.0.1", port))
        with pytest.raises(LinkError, match=rf"^127\.0\.0\.1:{port}: cannot connect in 0\.2 s$"):
            await connect("127.0.0.1", port, 0.2)


async def test_a_message_that_was_cancelled_before_it_went_takes_no_preamble_with_it(pair: Pair) -> None:
    messages, theirs = pair
    async with trio.open_nursery() as nursery:
        nursery.start_soon(messages.send, WELCOME)
        await trio.lowlevel.checkpoint()  # it has its turn, and has not come to send
        nursery.cancel_scope.cancel()
    await messages.send(wire.Refused("why"))
    assert await theirs.receive_some(1000) == wire.preamble() + wire.encode(wire.Refused("why"))
