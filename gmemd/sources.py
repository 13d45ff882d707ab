"""The daemon's side of a connection from a source, until the migration that it belongs to takes it over."""

import logging

import trio

from gmemd.errors import AbandonedError, GmemdError, LinkError, ProtocolError, RefusedError
from gmemd.migrate import wire
from gmemd.migrate.link import ControlLane, LinkSettings, MessageStream
from gmemd.migrate.state import Role
from gmemd.registry import Finished, Registry

log = logging.getLogger(__name__)

# A new source for a migration that ended this recently was started for that one.
FRESH_SECONDS = 60.0


class SourceConnections:
    """Accepts sources. At most `limit` connections at a time are in hand-shake or are control lanes."""

    def __init__(self, registry: Registry, settings: LinkSettings, limit: int) -> None:
        self.registry = registry
        self.settings = settings
        self._places = trio.CapacityLimiter(limit)

    async def serve(self, stream: trio.SocketStream) -> None:
        """One connection."""
        try:
            address = "{}:{}".format(*stream.socket.getpeername())
        except OSError:
            await trio.aclose_forcefully(stream)  # it has gone already
            return
        try:
            self._places.acquire_on_behalf_of_nowait(stream)
        except trio.WouldBlock:
            log.warning("%s: too many connections", address, extra={"once": "places", "every": 10.0})
            await trio.aclose_forcefully(stream)
            return
        messages = MessageStream(stream, Role.SOURCE, address)
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
        except GmemdError as error:  # of this host; by the time that the source comes again it may be mended
            log.error("%s: %s", address, error, extra={"once": str(error), "every": 60.0})
        finally:
            self._places.release_on_behalf_of(stream)
            if not taken:
                await trio.aclose_forcefully(stream)

    async def _shake_hands(self, messages: MessageStream) -> bool:
        """Returns whether somebody else owns the connection now."""
        first = None
        with trio.move_on_after(self.settings.handshake_timeout):
            first = await messages.receive()
        if first is None:
            raise LinkError(f"{messages.address}: no hello in {self.settings.handshake_timeout:.1f} s")
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

    async def _converse(self, messages: MessageStream, hello: wire.Hello) -> None:
        """A control lane: until its source goes, or the migration ends."""
        control = ControlLane(messages, Role.DESTINATION)
        control.take(hello)
        migration = self.registry.get(hello.migration)
        ended = self.registry.find_finished(hello.migration)
        if migration is None and ended and await self._say_ended(messages, hello, ended):
            return
        while migration is None:
            with trio.move_on_after(self.settings.heartbeat):
                migration = await self.registry.arrival(hello.migration)
                break
            await control.send(wire.Waiting())
        await migration.serve_source(control, hello)

    async def _say_ended(self, messages: MessageStream, hello: wire.Hello, ended: Finished) -> bool:
        """A source that was cut off at the very end hears how it ended. One that is new may mean another migration of
        the same name, and must not take the end of the old one for its own."""
        if hello.epoch and hello.epoch == ended.epoch and ended.token in (b"", hello.token):
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
