"""The two VMMs of a replay, as docs/handoff.md has them: one that gives its memory away, one that receives it."""

import socket
from contextlib import suppress
from pathlib import Path
from typing import Self

import trio

from gmemd import handoff
from gmemd.errors import UnavailableError
from gmemd_tools.replay.guest import Guest


def _seqpacket() -> trio.socket.SocketType:
    return trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _regions(guest: Guest, keys: tuple[str, ...]) -> list[dict[str, int]]:
    return [{key: getattr(region, key) for key in keys} for region in guest.regions]


async def listen(path: Path) -> trio.socket.SocketType:
    """A socket to which `gmemd-source` may connect."""
    listener = _seqpacket()
    await listener.bind(str(path))
    listener.listen()
    return listener


async def give(guest: Guest, listener: trio.socket.SocketType) -> None:
    """The source's VMM: answers every `gmemd-source` that connects, until cancelled. Its guest never ran."""
    with listener:
        while True:
            connection, _ = await listener.accept()
            with connection, suppress(OSError):  # one that died is followed by another
                await _answer(connection, guest)


async def _answer(connection: trio.socket.SocketType, guest: Guest) -> None:
    while True:
        data, descriptors = await handoff.receive(connection)
        descriptors.close()
        if not data:
            return
        asked = handoff.parse_untrusted(data)
        if "send" in asked:
            await handoff.send(connection, {"regions": _regions(guest, handoff.REGION_KEYS)}, guest.sent)
        elif "pause" in asked:
            await handoff.send(connection, {"paused": True})


class Receiver:
    """The destination's VMM."""

    def __init__(self, guest: Guest, daemon: Path, migration: str) -> None:
        self._guest = guest
        self._daemon = daemon
        self._migration = migration
        self._socket = _seqpacket()
        self.ready = trio.Event()  # the guest may run
        self.done = trio.Event()

    async def hand_over(self) -> None:
        """Gives the daemon its memory and userfaultfd."""
        regions = _regions(self._guest, handoff.REGION_KEYS + handoff.DESTINATION_KEYS)
        message = {"gmemd": handoff.VERSION, "receive": self._migration, "regions": regions}
        try:
            await self._socket.connect(str(self._daemon))
            await handoff.send(self._socket, message, [*self._guest.received, self._guest.uffd])
        except OSError as error:
            raise UnavailableError(f"{self._daemon}: {error.strerror or error}") from None

    async def listen(self) -> None:
        """Follows what the daemon says, until everything is in place. Raises what it says else."""
        await self._expect("ready")
        self.ready.set()
        await self._expect("done")
        self.done.set()

    async def _expect(self, what: str) -> None:
        try:
            data, descriptors = await handoff.receive(self._socket)
        except OSError as error:
            raise UnavailableError(f"the daemon: {error.strerror or error}") from None
        descriptors.close()
        message = handoff.parse_untrusted(data) if data else {"error": "it hung up"}
        if not message.get(what):
            raise UnavailableError(f"the daemon: {message.get('error') or message.get('abandoned') or message}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
