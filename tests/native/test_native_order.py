"""The order in which pages are sent: made of faults, whatever they are of, and followed by the background."""

import random
from collections.abc import Iterator, Sequence

import pytest
from native_frames import PAGES, ZERO
from native_rig import PAGE
from test_native_source import Host, run

from gmemd.native.memory import Region
from gmemd.native.source import Order
from gmemd.trace import RECORD

Fault = tuple[int, int]  # region, page


@pytest.fixture
def host() -> Iterator[Host]:
    with Host((256, PAGE), (64, PAGE)) as host:
        host.fill(*range(256))
        host.fill(*range(64), region=1)
        yield host


def order(host: Host, faults: Sequence[Fault], regions: Sequence[Region] = ()) -> Order:
    made = Order(host.memory)
    records = b"".join(RECORD.pack(0, page, 1, region, 0) for region, page in faults)
    made.add(records, regions or host.memory.regions)
    return made


def sent(host: Host) -> list[Fault]:
    """Pages in the order in which the background sends them."""
    found = run(*host.push())
    assert {frame.kind for frame in found} <= {PAGES, ZERO}
    return [(frame.region, frame.first + i) for frame in found for i in range(frame.count)]


def everything(host: Host) -> list[Fault]:
    return [(i, page) for i, (pages, _) in enumerate(host.shapes) for page in range(pages)]


def test_the_background_follows_it_and_then_sends_the_rest(host: Host, rng: random.Random) -> None:
    faults = rng.sample(everything(host), 100)
    made = order(host, faults + faults)
    assert made.counters()["pages"] == 100
    host.source.follow(made)
    pages = sent(host)
    assert pages[:100] == faults
    assert pages[100:] == sorted(set(everything(host)) - set(faults))


def test_neighbours_are_one_run(host: Host) -> None:
    made = order(host, [(0, 9), (0, 10), (0, 11), (1, 12), (0, 12)])
    assert made.counters() == {"pages": 5, "runs": 3, "outside": 0, "left_out": 0}


def test_a_run_is_cut_into_frames(host: Host) -> None:
    host.source.follow(order(host, [(0, page) for page in range(50, 250)]))
    frames = run(*host.push())
    assert [(frame.first, frame.count) for frame in frames][:4] == [(50, 64), (114, 64), (178, 64), (242, 8)]


def test_what_is_sent_already_is_not_sent_again(host: Host) -> None:
    host.source.follow(order(host, [(0, page) for page in range(20, 30)]))
    host.source.skip(0, 0, 25)
    pages = sent(host)
    assert pages[:5] == [(0, page) for page in range(25, 30)]
    assert sorted(pages) == everything(host)[25:]


def test_it_is_followed_anew_after_a_restart(host: Host) -> None:
    host.source.follow(order(host, [(1, 7), (0, 3)]))
    assert sent(host)[:2] == [(1, 7), (0, 3)]
    host.source.restart()
    assert sent(host)[:2] == [(1, 7), (0, 3)]


def test_pages_apart_go_out_together(host: Host) -> None:
    """Not each with a system call of its own: half a frame's worth at a time."""
    push, far = host.push()
    host.source.set_rate(1)  # which ends a push after what it sends at once
    host.source.follow(order(host, [(0, page) for page in range(0, 256, 2)]))
    push.run(50_000)
    assert host.source.counters()["background_pages"] == 32
    assert [far.frame_and_payload()[0].first for _ in range(32)] == list(range(0, 64, 2))


def test_pages_are_found_by_address(host: Host) -> None:
    """Regions that are cut in another way: the trace's second one begins in the middle of our first."""
    regions = [
        Region(offset=0, size=128 * PAGE, page_size=PAGE, gpa=0),
        Region(offset=0, size=1024 * PAGE, page_size=PAGE, gpa=128 * PAGE),
        Region(offset=0, size=64 * PAGE, page_size=PAGE, gpa=1 << 41),
    ]
    made = order(host, [(1, 2), (0, 1), (1, 128), (2, 3), (1, 127)], regions)
    assert made.counters() == {"pages": 3, "runs": 3, "outside": 2, "left_out": 0}
    host.source.follow(made)
    assert sent(host)[:3] == [(0, 130), (0, 1), (0, 255)]


def test_pages_of_another_size(host: Host) -> None:
    large = [Region(offset=0, size=1 << 21, page_size=1 << 16, gpa=0)]
    made = order(host, [(0, 3), (0, 15), (0, 16)], large)
    assert made.counters() == {"pages": 32, "runs": 2, "outside": 1, "left_out": 0}
    with Host((4, 16 * PAGE)) as coarse:
        small = [Region(offset=0, size=1 << 20, page_size=PAGE, gpa=0)]
        made = order(coarse, [(0, 63), (0, 0), (0, 15), (0, 16), (0, 64)], small)
        assert made.counters() == {"pages": 3, "runs": 2, "outside": 1, "left_out": 0}
