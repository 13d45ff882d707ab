"""The order in which a guest will need its pages, as traces tell it: docs/trace.md."""

import logging
from collections.abc import Sequence
from pathlib import Path

from gmemd.errors import DataError
from gmemd.native.memory import Memory
from gmemd.native.source import Order
from gmemd.trace import RECORD, TraceHeader, TraceReader, TraceWriter

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


def merge(paths: Sequence[Path], output: Path) -> int:
    """Writes one trace of several of one image: every page once, as soon after its trace's first fault as in the one
    that had it soonest. Returns how many pages. `output` may be one of `paths`, and is whole at any time. DataError if
    they are not of the same regions, or cannot be read or written."""
    first: dict[tuple[int, int], tuple[int, int, int]] = {}  # of a region's page: time, thread, flags
    origins: dict[TraceHeader, int] = {}  # the files of one rotating trace have the same header
    for path in paths:
        with TraceReader(path) as trace:
            if origins and trace.header.regions != next(iter(origins)).regions:
                raise DataError(f"{path}: not of the same regions as {paths[0]}")
            origins.setdefault(trace.header, -1)
            for time, page, thread, region, flags in RECORD.iter_unpack(b"".join(trace.blocks())):
                if origins[trace.header] < 0:
                    origins[trace.header] = time
                touch = (max(time - origins[trace.header], 0), thread, flags)
                first[region, page] = min(touch, first.get((region, page), touch))
    header = next(iter(origins))
    records = sorted((time, page, thread, region, flags) for (region, page), (time, thread, flags) in first.items())
    part = output.with_name(f".{output.name}.part")
    try:
        with TraceWriter(part, header.migration, header.regions) as writer:
            writer.add(b"".join(RECORD.pack(*record) for record in records))
        part.replace(output)
    except OSError as error:
        raise DataError(f"{output}: {error.strerror}") from None
    return len(records)
