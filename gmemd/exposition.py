"""How metrics are written for Prometheus: as text, and as protobuf, which alone has native histograms today.

prometheus_client writes no protobuf, and brings 10 MiB of modules into the daemon; both forms are short.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

TEXT = "text/plain; version=0.0.4; charset=utf-8"
PROTOBUF = "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"
SCHEMA = 2  # of native histograms: a bucket ends at a power of 2 to the 1/4, 19 % above the one before
ZERO_THRESHOLD = 2.0**-128  # what Prometheus takes for none
ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})
# io.prometheus.client.MetricType, and the field of Metric that holds such a value.
TYPES = {"counter": (0, 3), "gauge": (1, 2), "histogram": (4, 7)}


@dataclass(frozen=True, slots=True)
class Distribution:
    """How values are spread: at most `bound` were so many; and by the number of the native bucket, so many."""

    count: int
    sum: float
    zeros: int
    cumulative: list[tuple[float, int]]
    exponential: dict[int, int]


@dataclass(frozen=True, slots=True)
class Family:
    """One metric, a value for each set of labels."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    values: list[tuple[Mapping[str, str], float | Distribution]]


def text(families: Iterable[Family]) -> bytes:
    """Version 0.0.4, with classic histograms."""
    return "".join(line for family in families for line in _text_family(family)).encode()


def _text_family(family: Family) -> Iterator[str]:
    yield f"# HELP {family.name} {family.help}\n# TYPE {family.name} {family.kind}\n"
    for labels, value in family.values:
        if not isinstance(value, Distribution):
            yield f"{family.name}{_text_labels(labels)} {value!r}\n"
            continue
        for bound, count in value.cumulative:
            yield f"{family.name}_bucket{_text_labels({**labels, 'le': repr(bound)})} {count}\n"
        yield f"{family.name}_bucket{_text_labels({**labels, 'le': '+Inf'})} {value.count}\n"
        yield f"{family.name}_sum{_text_labels(labels)} {value.sum!r}\n"
        yield f"{family.name}_count{_text_labels(labels)} {value.count}\n"


def _text_labels(labels: Mapping[str, str]) -> str:
    inner = ",".join(f'{name}="{value.translate(ESCAPES)}"' for name, value in labels.items())
    return f"{{{inner}}}" if inner else ""


def protobuf(families: Iterable[Family]) -> bytes:
    """Messages of io.prometheus.client.MetricFamily, each behind its length."""
    return b"".join(_varint(len(message)) + message for message in map(_family, families))


def _family(family: Family) -> bytes:
    number, place = TYPES[family.kind]
    head = _bytes(1, family.name.encode()) + _bytes(2, family.help.encode()) + _number(3, number)
    return head + b"".join(_bytes(4, _metric(labels, value, place)) for labels, value in family.values)


def _metric(labels: Mapping[str, str], value: float | Distribution, place: int) -> bytes:
    pairs = (_bytes(1, name.encode()) + _bytes(2, text.encode()) for name, text in labels.items())
    inner = _histogram(value) if isinstance(value, Distribution) else _double(1, value)
    return b"".join(_bytes(1, pair) for pair in pairs) + _bytes(place, inner)


def _histogram(value: Distribution) -> bytes:
    classic = (_number(1, count) + _double(2, bound) for bound, count in value.cumulative)
    return b"".join(
        [
            _number(1, value.count),
            _double(2, value.sum),
            *(_bytes(3, bucket) for bucket in classic),
            _signed(5, SCHEMA),
            _double(6, ZERO_THRESHOLD),
            _number(7, value.zeros),
            *_exponential(value.exponential),
        ]
    )


def _exponential(buckets: dict[int, int]) -> Iterator[bytes]:
    """Runs of buckets in a row, each by its distance from the one before; then how each count differs from the last."""
    numbers = sorted(buckets)
    starts = [at for at, number in enumerate(numbers) if at == 0 or number != numbers[at - 1] + 1]
    end = 0
    for start, stop in pairwise([*starts, len(numbers)]):
        yield _bytes(12, _signed(1, numbers[start] - end) + _number(2, stop - start))
        end = numbers[stop - 1] + 1
    last = 0
    for number in numbers:
        yield _signed(13, buckets[number] - last)
        last = buckets[number]


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _signed(field: int, value: int) -> bytes:
    return _number(field, value << 1 if value >= 0 else (-value << 1) - 1)


def _double(field: int, value: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
