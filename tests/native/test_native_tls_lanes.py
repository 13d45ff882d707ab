"""Page lanes over TLS, with a peer whose TLS is Python's: guest memory gets what was sent, and nothing gets lost in
between."""

import random
import ssl
from collections.abc import Iterator

import pytest
from native_frames import BEAT, PAGES, REQUEST, Frame, beat, pages, request
from native_rig import PAGE, Far, Guest, Line, RunningPager, Task, content, new_file, tcp_pair, until

from gmemd.errors import LinkError
from gmemd.native.destination import Lane
from gmemd.native.memory import Memory, Populate, Region
from gmemd.native.source import Push, PushState, Server, Source
from gmemd.native.tls import Pem, Tls, TlsContext
from gmemd_tools.demo.certificates import Authority, Identity


class Wire:
    """A connection with TLS on it: ours at the near end, Python's at the far one."""

    def __init__(self, own: Identity, other: Identity, *, server: bool) -> None:
        far, self.near = tcp_pair()
        files = Pem(own.certificate.read_bytes(), own.key.read_bytes(), own.ca.read_bytes())
        self.tls = Tls(TlsContext(server=server, pem=files), self.near.fileno())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if server else ssl.PROTOCOL_TLS_SERVER)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(other.ca)
        context.load_cert_chain(other.certificate, other.key)
        wrapped = Task(lambda: context.wrap_socket(far, server_side=not server))
        until(lambda: self.tls.shake_hands() is None)
        self.far = wrapped.result()

    def close(self) -> None:
        self.far.close()
        self.near.close()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Identity, Identity]:
    authority = Authority(tmp_path_factory.mktemp("ca"))
    return authority.issue("src", "DNS:src"), authority.issue("dst", "DNS:dst")


@pytest.fixture
def to_us(hosts: tuple[Identity, Identity]) -> Iterator[Wire]:
    """We are the destination."""
    wire = Wire(hosts[1], hosts[0], server=True)
    yield wire
    wire.close()


@pytest.fixture
def from_us(hosts: tuple[Identity, Identity]) -> Iterator[Wire]:
    """We are the source."""
    wire = Wire(hosts[0], hosts[1], server=False)
    yield wire
    wire.close()


@pytest.fixture
def memory() -> Iterator[Memory]:
    """256 pages at the source."""
    fd = new_file(256, PAGE)
    with open(fd, "r+b") as file:
        file.write(b"".join(content(page) for page in range(256)))
        file.flush()
        with Memory("m", [Region(offset=0, size=256 * PAGE, page_size=PAGE, gpa=0)], [fd]) as memory:
            yield memory


@pytest.mark.parametrize("way", list(Populate))
def test_pages_arrive_however_they_are_cut(way: Populate, to_us: Wire, rng: random.Random) -> None:
    """In records of any size, and in every way to populate."""
    with Guest((256, PAGE), populate=way) as guest:
        lane = Lane(guest.destination, 1, to_us.near.fileno(), checksum=True, tls=to_us.tls)
        line = Line(lane, Far(to_us.far), to_us.near)
        data = b"".join(
            pages(0, at, b"".join(content(page) for page in range(at, at + 64))) + beat() for at in range(0, 256, 64)
        )
        while data:
            cut = rng.choice([1, 31, 4096, 16384, 100_000])
            line.feed(data[:cut])
            data = data[cut:]
        assert guest.received() == set(range(256))
        assert all(guest.held(page) == content(page) for page in range(256))
        lane.close()


def test_faults_are_answered_and_beats_go_on(to_us: Wire) -> None:
    """The pager asks, the source answers; what it sent before the pager had the lane is not overlooked."""
    with Guest() as guest, RunningPager() as running:
        pager = running.pager
        pager.add(guest.destination)
        lane = Lane(guest.destination, 0, to_us.near.fileno(), checksum=True, tls=to_us.tls)
        far = Far(to_us.far)
        far.send(pages(0, 9, content(9)))
        pager.set_urgent(guest.destination, lane)
        until(lambda: 9 in guest.received())
        for page in (3, 40):
            reader = Task(guest.read, page)
            assert Frame.decode(far.receive(32)).kind == REQUEST
            far.send(pages(0, page, content(page)))
            assert reader.result() == content(page)
        pager.remove(guest.destination)
        lane.close()


def test_a_background_lane_is_beaten_on_while_it_is_read(to_us: Wire) -> None:
    """From two threads at a time, as the daemon does."""
    with Guest((64, PAGE)) as guest:
        lane = Lane(guest.destination, 1, to_us.near.fileno(), checksum=True, tls=to_us.tls)
        line = Line(lane, Far(to_us.far), to_us.near)

        def beat_often() -> None:
            for _ in range(500):
                lane.beat()

        beater = Task(beat_often)
        heard = Task(lambda: [Frame.decode(line.far.receive(32)).kind for _ in range(500)])
        for page in range(64):
            line.feed(pages(0, page, content(page)))
        beater.result()
        assert heard.result() == [BEAT] * 500
        assert guest.received() == set(range(64))
        lane.close()


def test_a_source_pushes_and_hears_meanwhile(from_us: Wire, memory: Memory) -> None:
    source = Source(memory)
    push = Push(source, 1, from_us.near.fileno(), checksum=True, tls=from_us.tls)
    got: dict[int, bytes] = {}

    def take() -> None:
        while len(got) < 256:
            from_us.far.sendall(beat())
            header = Far(from_us.far).receive(32)
            frame = Frame.decode(header)
            payload = Far(from_us.far).receive(frame.length)
            assert frame.kind == PAGES
            got.update({frame.first + i: payload[i * PAGE : (i + 1) * PAGE] for i in range(frame.count)})

    taker = Task(take)
    until(lambda: push.run(5000) is PushState.DONE)
    taker.result()
    assert got == {page: content(page) for page in range(256)}
    until(push.hear)
    from_us.far.close()
    with pytest.raises(LinkError, match="background lane 1: closed by the destination"):
        until(lambda: push.hear() and False)
    push.close()
    source.close()


def test_a_source_answers_requests(from_us: Wire, memory: Memory) -> None:
    """Also those that had been read with the hand-shake's last record."""
    source = Source(memory)
    source.open()
    far = Far(from_us.far)
    far.send(request(0, 5) + request(0, 6))
    server = Server(source, from_us.near.fileno(), checksum=True, poll_us=0, tls=from_us.tls)
    running = Task(server.run)
    for page in (5, 6):
        frame = Frame.decode(far.receive(32))
        assert (frame.kind, frame.first, far.receive(frame.length)) == (PAGES, page, content(page))
    server.stop()
    running.result()
    server.close()
    source.close()


def test_a_worn_key_ends_the_lane(from_us: Wire, memory: Memory) -> None:
    source = Source(memory)
    push = Push(source, 1, from_us.near.fileno(), checksum=True, tls=from_us.tls)
    from_us.tls.set_most_records(3)
    with pytest.raises(LinkError, match=r"^background lane 1: TLS: as much was sent as one key is good for$"):
        push.run(1_000_000)
    push.close()
    source.close()
