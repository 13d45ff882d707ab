"""The comparison after the end: what each page had when it was put in place, before the guest could change it, with
what the source has. Nobody waits for it but the two, and nothing depends on it."""

from collections.abc import Iterator

import trio

from gmemd.errors import ProtocolError
from gmemd.migrate import wire
from gmemd.native.memory import Memory, Verdict

# Memory that is read for one message at most: a hang-up is not noticed meanwhile.
STEP_BYTES = 64 << 20


class Comparison:
    """The destination's end: takes the source's digests, which come in order."""

    def __init__(self, memory: Memory, threads: trio.CapacityLimiter) -> None:
        self.taken = 0  # pages; with any, the source has heard that all is complete
        self._memory = memory
        self._threads = threads
        self._sum = Verdict()
        self._region = self._page = 0  # that comes next

    async def take(self, message: wire.Digests) -> Verdict | None:
        """What came of it all, after the last."""
        self._check(message)
        self._sum += await trio.to_thread.run_sync(
            self._memory.compare, message.region, message.first, message.digests, limiter=self._threads
        )
        pages = len(message.digests) // wire.DIGEST_BYTES
        self._page += pages
        self.taken += pages
        if self._page == self._memory.regions[self._region].pages:
            self._region, self._page = self._region + 1, 0
        return self._sum if self._region == len(self._memory.regions) else None

    def _check(self, message: wire.Digests) -> None:
        regions, size = self._memory.regions, len(message.digests)
        if self._region == len(regions) or (message.region, message.first) != (self._region, self._page):
            raise ProtocolError(
                f"control lane: digests of region {message.region} from page {message.first} on, "
                f"those of region {self._region} from page {self._page} on are next: sent by the source"
            )
        pages, odd = divmod(size, wire.DIGEST_BYTES)
        if odd or not 0 < pages <= regions[self._region].pages - self._page:
            raise ProtocolError(
                f"control lane: {size} bytes of digests for {regions[self._region].pages - self._page} pages: "
                "sent by the source"
            )


def steps(memory: Memory) -> Iterator[tuple[int, int, int]]:
    """All of memory as (region, first page, pages), a message each."""
    for index, region in enumerate(memory.regions):
        most = min(wire.DIGESTS, STEP_BYTES // region.page_size)
        for first in range(0, region.pages, most):
            yield index, first, min(most, region.pages - first)
