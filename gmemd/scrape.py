"""Where Prometheus asks: HTTP for one request a connection, on a UNIX socket or on loopback."""

import logging
from collections.abc import Callable

import h11
import trio

from gmemd import exposition
from gmemd.exposition import Family

log = logging.getLogger(__name__)

TIMEOUT = 5.0
READ = 4096
SCRAPERS = 4  # at a time: who comes later waits, and is dropped if that takes too long
WAITING = 16  # beyond these, whoever comes is dropped at once


class Scrapes:
    """Answers whoever asks for /metrics. `collect` is called for that, and for nothing else."""

    def __init__(self, collect: Callable[[], list[Family]]) -> None:
        self.collect = collect
        self._places = trio.CapacityLimiter(SCRAPERS)

    async def serve(self, connection: trio.socket.SocketType) -> None:
        """Answers one request. Whoever stalls, or does not speak HTTP, is dropped."""
        async with trio.SocketStream(connection) as stream:
            if self._places.statistics().tasks_waiting >= WAITING:
                return
            with trio.move_on_after(TIMEOUT):
                try:
                    async with self._places:
                        await self._answer(stream, h11.Connection(h11.SERVER))
                except (trio.BrokenResourceError, h11.RemoteProtocolError) as error:
                    log.debug("scrape: %s", error)

    async def _answer(self, stream: trio.SocketStream, connection: h11.Connection) -> None:
        while (event := connection.next_event()) is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(READ))
        if not isinstance(event, h11.Request):
            return
        status, kind, body = self._respond(event)
        headers = [("Content-Type", kind), ("Content-Length", str(len(body))), ("Connection", "close")]
        out = [h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()]
        await stream.send_all(b"".join(connection.send(part) or b"" for part in out))

    def _respond(self, request: h11.Request) -> tuple[int, str, bytes]:
        if request.target.partition(b"?")[0] != b"/metrics":
            return 404, exposition.TEXT, b"there is /metrics\n"
        if request.method != b"GET":
            return 405, exposition.TEXT, b"there is GET\n"
        accepted = b",".join(value for name, value in request.headers if name == b"accept")
        if b"io.prometheus.client.MetricFamily" in accepted and b"delimited" in accepted:
            return 200, exposition.PROTOBUF, exposition.protobuf(self.collect())
        return 200, exposition.TEXT, exposition.text(self.collect())
