"""The daemon's side of a connection from a source, until the migration that it belongs to takes it over."""

import logging
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from gmemd.address import Address
from gmemd.errors import AbandonedError, GmemdError, LinkError, ProtocolError, RefusedError, UntrustedError
from gmemd.migrate import wire
from gmemd.migrate.destination import IncomingMigration
from gmemd.migrate.link import ControlLane, LinkSettings, MessageStream
from gmemd.migrate.state import Role
from gmemd.places import Places
from gmemd.registry import Finished, Registry

if TYPE_CHECKING:
    from gmemd.admission import Admission

log = logging.getLogger(__name__)

# A new source for a migration that ended this recently was started for that one.
FRESH_SECONDS = 60.0
# Sources may come before the VMM, but those for which none has come hold no more than this part of all places.
WAITING = 2
# A host that is refused in the same way again and again is told of this often.
UNTRUSTED_SECONDS = 10.0
# What it may have sent before it hears of that: a hello.
FAREWELL_READS = 4
TCP_USER_TIMEOUT = 18  # of linux/tcp.h: bytes that nobody takes for so many ms end the connection


class SourceConnections:
    """Accepts sources. At most `limit` connections at a time are in hand-shake or are control lanes, and at most
    `limit_of_peer` of one host."""

    def __init__(self, registry: Registry, settings: LinkSettings, limit: int, limit_of_peer: int) -> None:
        self.registry = registry
        self.settings = settings
        self.admission: Admission | None = None
        self._places = Places(limit, limit_of_peer)
        self._waiting = Places(max(1, limit // WAITING), limit_of_peer)

    async def serve(self, stream: trio.SocketStream) -> None:
        """One connection."""
        try:
            peer = Address.of(stream.socket.getpeername())
            stream.setsockopt(socket.IPPROTO_TCP, TCP_USER_TIMEOUT, round(self.settings.handshake_timeout * 1000))
        except OSError:
            await trio.aclose_forcefully(stream)  # it has gone already
            return
        with self._places.taken(peer.host) as place:
            if place:
                await self._admit(stream, peer)
            else:
                log.warning("%s: too many connections", peer.host, extra={"once": ("places", peer.host), "every": 10.0})
                await trio.aclose_forcefully(stream)

    async def _admit(self, stream: trio.SocketStream, peer: Address) -> None:
        """Sees who it is, where that matters."""
        address = str(peer)
        try:
            secured = await self.admission.admit(stream) if self.admission else stream
        except UntrustedError as error:
            about = {"once": (peer.host, str(error)), "every": UNTRUSTED_SECONDS}
            log.warning("%s: refused: %s", address, error, extra=about)
            await self._see_off(stream)
        except RefusedError as error:
            log.warning("%s: refused: %s", address, error)
            await self._tell(MessageStream(stream, Role.SOURCE, address), wire.Refused(str(error)))
            await trio.aclose_forcefully(stream)
        except LinkError as error:
            log.info("%s: %s", address, error)
            await trio.aclose_forcefully(stream)
        except GmemdError as error:
            _tell_own(address, error)
            await trio.aclose_forcefully(stream)
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        else:
            await self._serve(MessageStream(secured, Role.SOURCE, address))

    async def _see_off(self, stream: trio.SocketStream) -> None:
        """OpenSSL has told the peer why. To close over bytes that were not read would take it back."""
        try:
            with trio.move_on_after(self.settings.dead_after), suppress(trio.BrokenResourceError):
                await stream.send_eof()
                for _ in range(FAREWELL_READS):
                    if not await stream.receive_some():
                        break
        finally:
            await trio.aclose_forcefully(stream)

    async def _serve(self, messages: MessageStream) -> None:
        address = messages.address
        taken = False
        try:
            taken = await self._shake_hands(messages)
        except LinkError as error:
            log.info("%s", error)
        except (RefusedError, ProtocolError) as error:
            log.warning("%s: refused: %s", address, error)
            await self._tell(messages, wire.Refused(str(error)[: wire.MAX_TEXT]))
        except AbandonedError as error:
            log.info("%s: given up: %s", address, error)
            await self._tell(messages, wire.Failed(str(error)[: wire.MAX_TEXT]))
        except GmemdError as error:
            _tell_own(address, error)
        finally:
            if not taken:
                await trio.aclose_forcefully(messages.stream)

    async def _shake_hands(self, messages: MessageStream) -> bool:
        """Returns whether somebody else owns the connection now."""
        self._check_peer(messages, None)
        first = None
        with trio.move_on_after(self.settings.handshake_timeout):
            first = await messages.receive()
        if first is None:
            raise LinkError(f"{messages.address}: no hello in {self.settings.handshake_timeout:.1f} s")
        if isinstance(first, wire.LaneHello | wire.Hello):
            self._check_peer(messages, first.migration)
        if isinstance(first, wire.LaneHello):
            migration = self.registry.get(first.migration)
            if migration is None:
                raise RefusedError(f"lane {first.lane}: no migration {first.migration} here")
            await migration.attach(first, messages)
            return True
        if not isinstance(first, wire.Hello):
            raise ProtocolError(f"a connection cannot begin with {wire.NAMES[type(first)]}: sent by the source")
        await self._converse(messages, first)
        return False

    def _check_peer(self, messages: MessageStream, migration: str | None) -> None:
        if self.admission and messages.tls:
            self.admission.check(messages.tls, migration)

    async def _converse(self, messages: MessageStream, hello: wire.Hello) -> None:
        """A control lane: until its source goes, or the migration ends."""
        control = ControlLane(messages, Role.DESTINATION)
        control.take(hello)
        migration = self.registry.get(hello.migration)
        ended = self.registry.find_finished(hello.migration)
        its = ended and ended.was_with(hello.epoch, hello.token)  # even if the migration is still being closed
        if ended and (migration is None or its) and await self._say_ended(messages, hello, ended):
            return
        await (migration or await self._arrival(control, hello)).serve_source(control, hello)

    async def _arrival(self, control: ControlLane, hello: wire.Hello) -> IncomingMigration:
        """Waits for the VMM."""
        address = control.messages.address
        with self._waiting.taken(address.rpartition(":")[0]) as place:
            if not place:
                log.warning("%s: too many wait for their VMMs", address, extra={"once": "waiting", "every": 10.0})
                raise LinkError(f"{address}: too many wait for their VMMs")
            log.info("source %s waits for its VMM", address, extra={"migration": hello.migration})
            self.registry.waiting[address] = hello.migration
            try:
                while True:
                    with trio.move_on_after(self.settings.heartbeat):
                        return await self.registry.arrival(hello.migration)
                    await control.send(wire.Waiting())
            finally:
                del self.registry.waiting[address]

    async def _say_ended(self, messages: MessageStream, hello: wire.Hello, ended: Finished) -> bool:
        """A source that was cut off at the very end hears how it ended. One that is new may mean another migration of
        the same name, and must not take the end of the old one for its own."""
        if ended.was_with(hello.epoch, hello.token):
            if not ended.complete:
                raise AbandonedError(ended.told["link"] or "given up")
            await self._tell(messages, wire.Complete(ended.pages))
            return True
        if hello.epoch or ended.age < FRESH_SECONDS:
            raise RefusedError(f"migration {hello.migration} ended here {ended.age:.0f} s ago: {ended.phase}")
        return False

    async def _tell(self, messages: MessageStream, word: wire.Message) -> None:
        """Says the last that there is to say."""
        with trio.move_on_after(self.settings.dead_after):
            try:
                await messages.send_last(word)
            except LinkError as error:
                log.info("%s", error)


def _tell_own(address: str, error: GmemdError) -> None:
    """A trouble of this host. By the time that the source comes again it may be mended."""
    log.error("%s: %s", address, error, extra={"once": str(error), "every": 60.0})
