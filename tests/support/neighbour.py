"""The guest next door, and the guest that it is done wrong to."""

import itertools

from support.vmm import PAGE, Vmm

COUNT = 16  # pages of the latter
REGIONS = [[0, COUNT, 12]]

# Of the daemon.
SETTINGS = """
[limits]
regions = 4
memory = "1G"
state = "64K"
"""


class Neighbour:
    """A guest whose source sends only what it asks for."""

    def __init__(self, vmm: Vmm, content: bytes) -> None:
        self.vmm = vmm
        self.content = content
        self._next = itertools.count()

    def gets_a_page(self) -> None:
        page = next(self._next)
        assert self.vmm.read(page) == self.content[page * PAGE :][:PAGE]

    def gets_the_rest(self) -> None:
        pages = len(self.content) // PAGE
        assert self.vmm.read(0, pages=pages) == self.content
        assert self.vmm.expect("done")["pages"] == pages
