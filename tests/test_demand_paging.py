"""MINOR demand paging at the rate of a handler inside the VMM, measured as the kernel's demand_paging_test does it:
pages a second and vCPU, here with the content fetched. A ratio within one run is what tells.

Through gmemd both ways: with pager and source in one process and a socket pair between them, and as in a migration,
with a daemon, a source and TCP.
"""

import json
import os
import select
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
import trio
from support.recovery import Sender, filled, open_host
from vmm_build import FLAGS, SOURCES

from gmemd import handoff
from gmemd.native.destination import Destination, Lane, Pager
from gmemd.native.memory import Memory, Populate, Region
from gmemd.native.source import Server, Source

PAGE = 4096
SECONDS = 60  # for a run of half of one
PAGES = (16 << 20) // PAGE
ROUNDS = 3  # the best of so many, taken in turns, as a busy host slows whichever it hits
POLL_US = 50  # the daemon's and the source's own
# Of the handler's rate, on a host that may do something else: page by page, and with pages sent ahead.
LEAST = {0: 0.3, 16: 0.8}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("demand") / "demand_paging"
    sources = [Path(__file__).parent / "support/demand_paging.c", *sorted(SOURCES.glob("*.c"))]
    command = ["cc", *FLAGS, *(str(source) for source in sources if source.name != "main.c"), "-o", str(path)]
    subprocess.run(command, check=True)
    return path


def touch(program: Path, gmemd: Path | str, vcpus: int) -> float:
    """Runs the vCPUs; pages a second and vCPU."""
    command = [str(program), "destination", f"--gmemd={gmemd}", "--migration=demand", f"--memory={PAGES * PAGE}"]
    done = subprocess.run([*command, f"--vcpus={vcpus}"], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout
    return float(json.loads(done.stdout)["pages_per_s_vcpu"])


@contextmanager
def running(work: Callable[[], None], stop: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop()
        thread.join()


def serve_here(listener: socket.socket, content: int, ahead: int) -> None:
    """Takes one hand-off, and answers its faults until its VMM is through."""
    with ExitStack() as stack:
        vmm = stack.enter_context(listener.accept()[0])
        data, fds, _, _ = socket.recv_fds(vmm, handoff.MAX_MESSAGE, handoff.MAX_DESCRIPTORS)
        for fd in fds:
            stack.callback(os.close, fd)
        asked = handoff.receive_untrusted(handoff.parse_untrusted(data), len(fds))
        memory = stack.enter_context(closing(Memory("demand", asked.regions, fds, fds)))
        memory.set_populate(0, Populate.WRITE)
        memory.register()
        destination = stack.enter_context(closing(Destination(memory)))
        ends = [stack.enter_context(end) for end in socket.socketpair()]
        for end in ends:
            end.setblocking(False)
        there = stack.enter_context(
            closing(Memory("demand", [Region(offset=0, size=PAGES * PAGE, page_size=PAGE, gpa=0)], [content]))
        )
        source = stack.enter_context(closing(Source(there)))
        source.open()
        server = Server(source, ends[0].fileno(), checksum=True, poll_us=POLL_US, ahead=ahead)
        stack.enter_context(closing(server))
        lane = stack.enter_context(closing(Lane(destination, 0, ends[1].fileno(), checksum=True)))
        pager = stack.enter_context(closing(Pager(POLL_US)))
        stack.enter_context(running(server.run, server.stop))
        stack.enter_context(running(pager.run, pager.stop))
        pager.add(destination)
        pager.set_urgent(destination, lane)
        vmm.send(b'{"ready": true}')
        select.select([destination.event_fd], [], [], SECONDS)  # nothing is missing
        vmm.send(b'{"done": true}')
        pager.remove(destination)


def local(program: Path, folder: Path, vcpus: int, ahead: int) -> float:
    path, content = folder / "local.sock", filled(PAGES)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        with running(lambda: serve_here(listener, content, ahead), lambda: None):
            rate = touch(program, path, vcpus)
    path.unlink()
    socket.close(content)
    return rate


async def over_tcp(program: Path, folder: Path, vcpus: int, ahead: int) -> float:
    async with open_host(folder) as host:
        with Sender("demand", PAGES, host.plan.port) as sender:
            file = f"--file=/proc/{os.getpid()}/fd/{sender.fd}"
            words = [f"127.0.0.1:{host.plan.port}", "--migration=demand", file, "--no-background", f"--ahead={ahead}"]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.run_process, [sys.executable, "-m", "gmemd.source_cli", *words])
                return await trio.to_thread.run_sync(touch, program, host.handoff, vcpus)


@pytest.mark.skipif("GMEMD_TIMING" not in os.environ, reason="rates need a quiet host: `make test-timing`")
@pytest.mark.usefixtures("require_kvm")
@pytest.mark.deadline(120)
@pytest.mark.parametrize(("vcpus", "ahead"), [(1, 0), (2, 0), (1, 16)])
async def test_pages_come_at_the_rate_of_a_handler_inside(
    vcpus: int, ahead: int, program: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """With `ahead`, the default, the source sends pages before a guest that walks through memory asks for them."""
    best = {"inside": 0.0, "local": 0.0, "tcp": 0.0}
    for _ in range(ROUNDS):
        rates = {
            "inside": await trio.to_thread.run_sync(touch, program, "-", vcpus),
            "local": await trio.to_thread.run_sync(local, program, tmp_path, vcpus, ahead),
            "tcp": await over_tcp(program, tmp_path, vcpus, ahead),
        }
        best = {way: max(best[way], rate) for way, rate in rates.items()}
    for way, rate in best.items():
        request.node.user_properties.append((f"demand_paging_{way}_pages_per_s_vcpu", round(rate)))
        print(f"{way}: {rate:.0f} pages/s a vCPU, ratio {rate / best['inside']:.2f}")
    assert min(best["local"], best["tcp"]) > LEAST[ahead] * best["inside"], best


def test_its_program_is_built_with_what_it_shares(program: Path) -> None:
    """Rates are measured rarely; that they can be is seen always."""
    assert os.access(program, os.X_OK)
