"""The bad network: read from text, and as what passes through it finds it."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from gmemd.errors import UnavailableError, UsageError
from gmemd.migrate.tasks import open_tasks
from gmemd_tools.network.conditions import Conditions, Trouble, When, parse
from gmemd_tools.network.link import Link
from gmemd_tools.network.namespace import slow_down
from gmemd_tools.network.trouble import Troubles

MIB = 1 << 20


def test_conditions_are_read() -> None:
    assert parse("") == Conditions()
    assert parse("latency=5ms,jitter=0.2ms,rate=100M,reorder=1s", seed=7) == Conditions(
        latency=0.005, jitter=0.0002, rate=100 * MIB, reorder=1.0, seed=7
    )
    assert parse("loss=0.5%,by=kernel") == Conditions(loss=0.005, kernel=True)
    assert parse("cut@3s,stall=200ms@64M,corrupt=8@~2s,daemon-kill@/run/now,seed=3", seed=7) == Conditions(
        seed=3,
        troubles=(
            Trouble("cut", 0, When(after=3.0)),
            Trouble("stall", 0.2, When(byte=64 * MIB)),
            Trouble("corrupt", 8, When(every=2.0)),
            Trouble("daemon-kill", 0, When(file=Path("/run/now"))),
        ),
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("latency=5", "'5' is no time: as 5ms"),
        ("latency", "there are latency=, "),
        ("speed=1", "half-open"),
        ("rate=fast", "must be a size"),
        ("cut", "say when: @3s"),
        ("cut=1@3s", "takes no amount"),
        ("cut@soon", "must be a size"),
        ("stall=5M@3s", "'5M' is no time"),
        ("loss=200%,by=kernel", "is no share"),
        ("loss=1%", "add by=kernel"),
        ("by=magic", "relay or kernel"),
        ("cut@1s,by=kernel", "takes latency, jitter, rate and loss"),
    ],
)
def test_what_is_no_condition_is_refused(text: str, why: str) -> None:
    with pytest.raises(UsageError, match="--network") as error:
        parse(text)
    assert why in str(error.value)


@asynccontextmanager
async def linked(conditions: str = "") -> AsyncIterator[tuple[Link, trio.SocketStream, trio.SocketStream]]:
    """A link, and both ends of a connection over it."""
    send, arrive = trio.open_memory_channel[trio.SocketStream](1)
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")

        async def serve(stream: trio.SocketStream) -> None:
            await send.send(stream)
            await trio.sleep_forever()

        nursery.start_soon(trio.serve_listeners, serve, listeners)
        link = Link(listeners[0].socket.getsockname()[1], parse(conditions))
        await nursery.start(link.run)
        async with AsyncExitStack() as stack:
            near = await stack.enter_async_context(await trio.open_tcp_stream("127.0.0.1", link.port))
            far = await stack.enter_async_context(await arrive.receive())
            yield link, near, far
        nursery.cancel_scope.cancel()


async def receive(stream: trio.SocketStream, count: int = MIB) -> bytes:
    """So many bytes, or what there is until the end."""
    data = b""
    while len(data) < count and (some := await stream.receive_some(count - len(data))):
        data += some
    return data


async def test_everything_passes_and_so_does_the_end() -> None:
    async with linked() as (link, near, far):
        await near.send_all(b"up")
        await near.send_eof()
        assert await receive(far) == b"up"
        await far.send_all(b"down")
        await far.send_eof()
        assert await receive(near) == b"down"
        assert link.passed == 6


async def test_latency_is_there_both_ways_and_the_order_stays() -> None:
    async with linked("latency=20ms,jitter=20ms") as (_, near, far):
        begin = trio.current_time()
        for number in range(20):
            await near.send_all(b"%03d" % number)
        assert await receive(far, 60) == b"".join(b"%03d" % number for number in range(20))
        await far.send_all(b"x")
        assert await receive(near, 1) == b"x"
        assert trio.current_time() - begin >= 0.04
        await near.send_eof()
        assert await receive(far) == b""


async def test_rate_is_kept() -> None:
    async with linked("rate=8M") as (link, near, far):
        begin = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.send_all, bytes(MIB))
            assert len(await receive(far)) == MIB
        assert trio.current_time() - begin >= 0.1
        assert link.passed == MIB


async def test_a_cut_is_a_reset() -> None:
    async with linked() as (link, near, far):
        await near.send_all(b"x")
        assert await receive(far, 1) == b"x"
        link.cut()
        for end in (near, far):
            with pytest.raises(trio.BrokenResourceError):
                await end.receive_some()


async def test_nothing_passes_while_it_stalls(autojump_clock: object) -> None:
    del autojump_clock
    async with linked() as (link, near, far):
        link.stall()
        await near.send_all(b"x")
        with trio.move_on_after(5) as scope:
            await far.receive_some()
        assert scope.cancelled_caught
        link.heal()
        assert await receive(far, 1) == b"x"


async def test_what_is_half_open_stays_silent(autojump_clock: object) -> None:
    del autojump_clock
    async with linked() as (link, near, far):
        await near.send_all(b"x")
        assert await receive(far, 1) == b"x"
        link.go_silent()
        await near.send_all(b"y")
        with trio.move_on_after(5) as scope:
            await far.receive_some()
        assert scope.cancelled_caught


async def test_bits_turn_over() -> None:
    data = random.Random(1).randbytes(1000)
    found = []
    for _ in range(2):
        async with linked("seed=5") as (link, near, far):
            link.corrupt(3)
            await near.send_all(data)
            found.append(await receive(far, 1000))
            await near.send_all(data)
            assert await receive(far, 1000) == data
    assert found[0] == found[1]
    assert sum(bin(a ^ b).count("1") for a, b in zip(data, found[0], strict=True)) == 3


async def test_bytes_are_lost_in_the_middle() -> None:
    data = random.Random(1).randbytes(1000)
    async with linked() as (link, near, far):
        link.lose(100)
        await near.send_all(data)
        await near.send_eof()
        arrived = await receive(far)
        at = next(i for i in range(901) if i == 900 or arrived[i] != data[i])
        assert arrived == data[:at] + data[at + 100 :]


async def test_a_truncated_stream_ends_in_good_order() -> None:
    data = random.Random(1).randbytes(1000)
    async with linked() as (link, near, far):
        link.truncate()
        await near.send_all(data)
        arrived = await receive(far)
        assert len(arrived) < 1000
        assert data.startswith(arrived)


async def test_connections_overtake_one_another() -> None:
    """Held back by as much as the seed says."""
    order: list[bytes] = []
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")

        async def serve(stream: trio.SocketStream) -> None:
            async with stream:
                order.append(await receive(stream, 1))

        async def send(number: int) -> None:
            async with await trio.open_tcp_stream("127.0.0.1", link.port) as stream:
                await stream.send_all(b"%d" % number)
                await stream.receive_some()  # its end

        nursery.start_soon(trio.serve_listeners, serve, listeners)
        link = Link(listeners[0].socket.getsockname()[1], parse("reorder=100ms,seed=3"))
        await nursery.start(link.run)
        for number in range(8):
            nursery.start_soon(send, number)
            await trio.sleep(0.002)
        while len(order) < 8:
            await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert sorted(order) == [b"%d" % number for number in range(8)]
    assert order != sorted(order)


async def test_troubles_come_when_they_are_due(tmp_path: Path) -> None:
    trigger = tmp_path / "now"
    text = f"source-kill@100ms,daemon-kill@~50ms,stall=10ms@100,corrupt@{trigger}"
    happened: list[tuple[str, float]] = []
    enough = trio.Event()

    def note(kind: str) -> Callable[[], object]:
        async def strike() -> None:
            happened.append((kind, trio.current_time()))
            if {"source-kill", "daemon-kill"} <= {kind for kind, _ in happened} and not trigger.exists():
                enough.set()

        return strike

    async with linked(text) as (link, near, far), open_tasks() as tasks:
        begin = trio.current_time()
        troubles = Troubles(parse(text), link, {kind: note(kind) for kind in ("source-kill", "daemon-kill")})  # type: ignore[misc]
        troubles.start(tasks)
        trigger.touch()
        await near.send_all(bytes(100))
        await receive(far, 100)
        await enough.wait()
        tasks.stop()
    assert [time - begin >= 0.1 for kind, time in happened if kind == "source-kill"] == [True]
    assert troubles.struck >= len(happened) + 2


async def test_a_kernel_without_the_queue(require_command: Callable[[str], str]) -> None:
    require_command("tc")
    with pytest.raises(UnavailableError) as told:
        await slow_down((), "lo", ("nosuch",))
    if "Operation not permitted" in str(told.value):
        pytest.skip(str(told.value))
    assert "by=kernel: this kernel has no nosuch (CONFIG_NET_SCH_NOSUCH): leave out by=kernel" in str(told.value)
