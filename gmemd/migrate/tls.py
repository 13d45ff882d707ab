"""TLS under trio: the hand-shake, and a connection's bytes before and between what native code does with it."""

from collections.abc import Callable, Collection

import trio

from gmemd.errors import GmemdError, LinkError, UntrustedError
from gmemd.native.tls import Tls, TlsContext, Wants

ANYBODY = "*"  # in a list of names: whoever has a certificate of our authorities, or a key of ours
READ_BYTES = 64 * 1024


class TlsStream(trio.abc.HalfCloseableStream):
    """A connection whose hand-shake is done. What breaks it is a GmemdError."""

    def __init__(self, transport: trio.SocketStream, session: Tls) -> None:
        self.transport = transport
        self.session = session
        self.socket = transport.socket

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        with memoryview(data) as rest:
            sent = 0
            await trio.lowlevel.checkpoint()
            while sent < len(data):
                put = self.session.write(rest[sent:])
                if isinstance(put, int):
                    sent += put
                else:
                    await _wait(self.socket, put, Wants.WRITE)

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.wait_writable(self.socket)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        while isinstance(data := self.session.read(max_bytes or READ_BYTES), Wants):
            await _wait(self.socket, data, Wants.READ)
        return data

    async def send_eof(self) -> None:
        self.session.close()
        await self.transport.send_eof()

    async def aclose(self) -> None:
        self.session.close()
        await self.transport.aclose()


Stream = trio.SocketStream | TlsStream


async def _wait(socket: trio.socket.SocketType, wants: Wants, usual: Wants) -> None:
    """Another task may wait for the other direction: nothing but a peer that changes keys has us want it."""
    if wants is not usual:
        raise LinkError("TLS: new keys, and no room to answer")
    await (trio.lowlevel.wait_readable if wants is Wants.READ else trio.lowlevel.wait_writable)(socket)


async def shake_hands(transport: trio.SocketStream, context: TlsContext, timeout: float) -> TlsStream:
    """The connection with TLS on it. UntrustedError if either end refuses the other, LinkError if it came to
    nothing."""
    session = Tls(context, transport.socket.fileno())
    with trio.move_on_after(timeout):
        while wants := session.shake_hands():
            await _wait(transport.socket, wants, wants)
        return TlsStream(transport, session)
    raise LinkError(f"TLS: no hand-shake in {timeout:.1f} s")


def check_name(session: Tls, names: Collection[str], what: str) -> None:
    """Whether the peer has one of these names; `what` they are is for the message."""
    if ANYBODY not in names and not any(session.peer_is(name) for name in names):
        raise UntrustedError(f"{session.peer}: none of {what}: {', '.join(sorted(names)) or '(nobody)'}")


class Secured:
    """How a source's connections are made: as whom, and to whom. `context` may be another at each call, when
    certificates have changed meanwhile."""

    def __init__(self, context: Callable[[], TlsContext], names: Collection[str]) -> None:
        self._context = context
        self._names = names

    async def shake_hands(self, transport: trio.SocketStream, timeout: float) -> TlsStream:
        """With a destination that has one of our names for it, or our key."""
        stream = await shake_hands(transport, self._context(), timeout)
        if not stream.session.is_shared:
            check_name(stream.session, self._names, "the names that the destination may have")
        return stream


def at(address: str, error: GmemdError) -> GmemdError:
    """The same error, with the address that it is about."""
    return type(error)(f"{address}: {error}")
