"""A guest that walks through memory gets its next pages before it asks; one that jumps gets only what it asks for."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import pytest
from native_frames import BEAT, request
from native_rig import PAGE, Far, Task, content, new_file, tcp_pair

from gmemd.native.memory import Memory, Region
from gmemd.native.source import Push, PushState, Server, Source

PAGES = 512
MOST = 16


@contextmanager
def serving(ahead: int) -> Iterator[tuple[Source, Far]]:
    """A source of 512 pages, each with content, and the destination's end of its urgent lane."""
    file = new_file(PAGES, PAGE)
    with open(file, "wb") as memory_file:
        memory_file.write(b"".join(content(page, 0, PAGE) for page in range(PAGES)))
        memory_file.flush()
        with Memory("test", [Region(offset=0, size=PAGES * PAGE, page_size=PAGE, gpa=0)], [file]) as memory:
            source = Source(memory)
            source.open()
            far, near = tcp_pair()
            server = Server(source, near.fileno(), checksum=True, poll_us=0, ahead=ahead)
            task = Task(server.run)
            try:
                yield source, Far(far)
            finally:
                server.stop()
                task.join()
                server.close()
                source.close()
                far.close()
                near.close()


def answer(far: Far, page: int) -> list[int]:
    """Asks for a page. Returns the pages that come for it; the one asked for comes first, with all of its content."""
    far.send(request(0, page) + request(0, PAGES - 1))
    got: list[int] = []
    while not got or got[-1] != PAGES - 1:
        frame, payload = far.frame_and_payload()
        if frame.kind == BEAT:
            continue
        for i in range(frame.count):
            assert payload[i * PAGE : (i + 1) * PAGE] == content(frame.first + i, 0, PAGE)
            got.append(frame.first + i)
    return got[:-1]


def walk(far: Far, first: int, steps: int) -> list[list[int]]:
    """Faults always on the page behind what came."""
    answers = []
    for _ in range(steps):
        answers.append(answer(far, first))
        first = answers[-1][-1] + 1
    return answers


def sizes(answers: Sequence[Sequence[int]]) -> list[int]:
    return [len(pages) for pages in answers]


def test_the_window_doubles_up_to_its_most() -> None:
    with serving(MOST) as (source, far):
        answers = walk(far, 10, 7)
        assert sizes(answers) == [1, 2, 3, 5, 9, 17, 17]
        assert list(chain(*answers)) == list(range(10, 10 + sum(sizes(answers))))
        assert source.counters()["ahead_pages"] == sum(sizes(answers)) - 7


def test_a_guest_that_jumps_gets_what_it_asks_for(rng: random.Random) -> None:
    # Pages that are further apart than a walk reaches, in any order.
    pages = list(range(0, PAGES - 1, 100))
    rng.shuffle(pages)
    with serving(MOST) as (source, far):
        assert [answer(far, page) for page in pages] == [[page] for page in pages]
        assert source.counters()["ahead_pages"] == 0


def test_two_walks_at_once() -> None:
    with serving(MOST) as (_, far):
        here, there = 0, 256
        for expected in (1, 2, 3, 5):
            low, high = answer(far, here), answer(far, there)
            assert sizes([low, high]) == [expected, expected]
            here, there = low[-1] + 1, high[-1] + 1


def test_off() -> None:
    with serving(0) as (_, far):
        assert sizes(walk(far, 0, 5)) == [1] * 5


@pytest.mark.parametrize(("most", "steps", "follows"), [(MOST, 3, False), (MOST, 4, True), (2, 2, False), (2, 3, True)])
def test_the_background_follows_none_who_came_near_by_chance(most: int, steps: int, follows: bool) -> None:
    with serving(most) as (source, far):
        behind = walk(far, 100, steps)[-1][-1] + 1
        end, near = tcp_pair()
        push = Push(source, 1, near.fileno(), checksum=True)
        push.run(1_000_000)
        first, _ = Far(end).frame_and_payload()
        assert first.first == (behind if follows else 0)
        push.close()
        end.close()
        near.close()


def test_the_background_goes_on_behind_the_walk_and_comes_round() -> None:
    with serving(MOST) as (source, far):
        walked = list(chain(*walk(far, 100, 5)))
        end, near = tcp_pair()
        push = Push(source, 1, near.fileno(), checksum=True)
        assert push.run(1_000_000) in (PushState.DONE, PushState.FULL)
        first, _ = Far(end).frame_and_payload()
        assert first.first == walked[-1] + 1
        seen = set(range(first.first, first.first + first.count))
        wanted = set(range(PAGES - 1)) - set(walked)
        while seen != wanted:
            push.run(1_000_000)
            frame, _ = Far(end).frame_and_payload()
            new = set(range(frame.first, frame.first + frame.count))
            assert not new & seen
            seen |= new
        push.close()
        end.close()
        near.close()
