"""The order in which a guest will need its pages, as traces tell it: docs/trace.md."""

import logging
from collections.abc import Sequence
from pathlib import Path

from gmemd.native.memory import Memory
from gmemd.native.source import Order
from gmemd.trace import TraceReader

log = logging.getLogger(__name__)


def must_be_traces(paths: Sequence[Path]) -> None:
    """Raises DataError for one that is none, before anybody is asked for anything."""
    for path in paths:
        TraceReader(path).close()


def read(paths: Sequence[Path], memory: Memory) -> Order:
    """The pages of `memory` in the order in which these files, one after another, have them first. DataError if one is
    no trace. What is of other memory is passed over with a warning: an order is a hint, and all is sent in the end."""
    order = Order(memory)
    for path in paths:
        with TraceReader(path) as trace:
            for records in trace.blocks():
                order.add(records, trace.header.regions)
    told = order.counters()
    names = ", ".join(map(str, paths))
    if told["outside"]:
        log.warning("%s: %d faults are on pages that this guest does not have: passed over", names, told["outside"])
    if told["left_out"]:
        log.warning("%s: %d faults are beyond an order of %d runs: left out", names, told["left_out"], told["runs"])
    if not told["pages"]:
        log.warning("%s: no page of this guest is in it: sent as without it", names)
    return order
