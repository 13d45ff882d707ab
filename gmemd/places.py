"""Places for connections: so many in all, and for each who comes so many that the others have some left."""

from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager


class Places:
    def __init__(self, in_all: int, each: int) -> None:
        self._in_all = in_all
        self._each = each
        self._taken: Counter[Hashable] = Counter()

    @contextmanager
    def taken(self, who: Hashable) -> Iterator[bool]:
        """Holds one place; False if there is none."""
        if self._taken.total() >= self._in_all or self._taken[who] >= self._each:
            yield False
            return
        self._taken[who] += 1
        try:
            yield True
        finally:
            self._taken[who] -= 1
            self._taken += Counter()  # forgets who has none
