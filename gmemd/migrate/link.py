"""Connections: the control lane as a stream of messages, and what all lanes share."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import trio

from gmemd.address import Address
from gmemd.errors import GmemdError, KernelError, LinkError, ProtocolError, reason
from gmemd.migrate import wire
from gmemd.migrate.state import Conversation, Role
from gmemd.migrate.tls import Secured, Stream, TlsStream, at
from gmemd.native.tls import Tls

M = TypeVar("M", bound=wire.Message)

READ_BYTES = 64 * 1024
# The largest message takes this long at 26 KB/s. One that takes longer has a length that was damaged on the way: beats
# would fill it up for half an hour.
MESSAGE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """Times in seconds: between signs of life, of silence after which a lane is dead, for a hand-shake. `poll_us`: the
    longest poll before a sleep on the urgent lane, in µs. `ahead`: pages that a guest which walks through memory gets
    before it asks, at most."""

    heartbeat: float = 0.3
    dead_after: float = 1.0
    handshake_timeout: float = 10.0
    checksum: bool = True
    poll_us: int = 100
    ahead: int = 16


class MessageStream:
    """One connection as messages. Every way that the connection can end raises LinkError, every wrong byte
    ProtocolError. Nothing is read beyond a message: on a page lane, frames may follow it at once."""

    def __init__(self, stream: Stream, peer: Role, address: str) -> None:
        self.stream = stream
        self.address = address
        self.heard = time.monotonic()
        self._begun = 0.0  # when the first bytes came of what is not whole yet
        self._decoder = wire.Decoder(peer.value)
        self._sending = trio.Lock()
        self._preamble = wire.preamble()

    async def send(self, message: wire.Message) -> None:
        """Sends one message, the first behind the preamble."""
        data = wire.encode(message)
        async with self._sending:
            with self._named():
                await self.stream.send_all(self._preamble + data)
            self._preamble = b""  # not before: who is cancelled here has sent nothing

    async def receive(self) -> wire.Message:
        """The next message."""
        while (message := self._decoder.next_message_untrusted()) is None:
            with self._named():
                data = await self.stream.receive_some(self._decoder.wanted)
            if not data:
                where = " in the middle of a message" if self._decoder.pending else ""
                raise LinkError(f"{self.address}: connection closed{where}")
            now = self.heard = time.monotonic()
            if not self._decoder.pending:
                self._begun = now
            elif now - self._begun > MESSAGE_SECONDS:
                raise LinkError(f"{self.address}: a message does not end in {MESSAGE_SECONDS:.0f} s")
            self._decoder.receive(data)
        return message

    async def send_last(self, message: wire.Message) -> None:
        """Sends a message and waits until the peer has hung up: to close over bytes that were not read would take it
        back."""
        await self.send(message)
        with self._named():
            await self.stream.send_eof()
            while await self.stream.receive_some(READ_BYTES):
                pass

    @contextmanager
    def _named(self) -> Iterator[None]:
        """An end of the connection is told with whose it was."""
        try:
            yield
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise LinkError(f"{self.address}: {reason(error.__cause__ or error)}") from None
        except GmemdError as error:
            raise at(self.address, error) from None

    def take_socket(self) -> trio.socket.SocketType:
        """The socket, for frames from now on."""
        return self.stream.socket

    @property
    def tls(self) -> Tls | None:
        """The session on it."""
        return self.stream.session if isinstance(self.stream, TlsStream) else None


class ControlLane:
    """A control lane, held to the conversation at both ends."""

    def __init__(self, messages: MessageStream, role: Role) -> None:
        self.messages = messages
        self.conversation = Conversation()
        self._role = role
        self._peer = Role.DESTINATION if role is Role.SOURCE else Role.SOURCE

    async def send(self, message: wire.Message) -> None:
        self.conversation.step(self._role, message)
        await self.messages.send(message)

    async def receive(self) -> wire.Message:
        message = await self.messages.receive()
        self.conversation.step(self._peer, message)
        return message

    def take(self, message: wire.Message) -> None:
        """Follows a message of the peer's that was received elsewhere."""
        self.conversation.step(self._peer, message)

    @property
    def silent_for(self) -> float:
        """Seconds since the peer was last heard."""
        return time.monotonic() - self.messages.heard

    def expect_signs_of_life(self) -> None:
        """From now on the peer has to be heard; until now it may have had nothing to say."""
        self.messages.heard = time.monotonic()


async def connect(host: str, port: int, timeout: float, secured: Secured | None = None) -> MessageStream:
    """Connects to a destination, and shakes hands with it if that is asked for."""
    address = str(Address(host, port))
    try:
        with trio.fail_after(timeout):
            stream = await trio.open_tcp_stream(host, port)
    except trio.TooSlowError:
        raise LinkError(f"{address}: cannot connect in {timeout:.1f} s") from None
    except (OSError, UnicodeError) as error:
        # Of several addresses, each had a reason of its own.
        why = error.__cause__.exceptions[0] if isinstance(error.__cause__, ExceptionGroup) else error
        raise LinkError(f"{address}: cannot connect: {reason(why)}") from None
    if secured is None:
        return MessageStream(stream, Role.DESTINATION, address)
    try:
        return MessageStream(await secured.shake_hands(stream, timeout), Role.DESTINATION, address)
    except KernelError as error:  # of this host, as when there is no descriptor for a socket: it may pass
        await trio.aclose_forcefully(stream)
        raise LinkError(f"{address}: cannot connect: {error}") from None
    except GmemdError as error:
        await trio.aclose_forcefully(stream)
        raise at(address, error) from None
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise


def expect(message: wire.Message, kind: type[M], peer: Role) -> M:
    """The message, if it is what it has to be."""
    if not isinstance(message, kind):
        raise ProtocolError(
            f"control lane: {wire.NAMES[type(message)]} in place of {wire.NAMES[kind]}: sent by the {peer.value}"
        )
    return message
