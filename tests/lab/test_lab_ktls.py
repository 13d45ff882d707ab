"""The kernel enciphers what is sent, where it and OpenSSL can: the same guest moves with that and without."""

import random
import resource
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest
from support.daemon import DaemonProcess
from support.source import SourceProcess, guest_content
from support.vmm import PAGE, Vmm

from gmemd import probe_host
from gmemd_tools.demo.certificates import Authority

SETTINGS = """[tls]
certificate = "{host.certificate}"
key = "{host.key}"
ca = "{host.ca}"
peers = ["*"]
ktls = {ktls}
"""
PAGES = 4096
REPETITIONS = 3


class Cost(NamedTuple):
    """Of one move, in seconds: from the guest's leaving until nothing is missing, and of the source's CPU."""

    took: float
    source_cpu: float


class Mover:
    """A daemon and sources that let the kernel encipher, or do not."""

    def __init__(self, folder: Path, ktls: bool, content: bytes) -> None:
        folder.mkdir()
        host = Authority(folder).issue("host", "IP:127.0.0.1")
        self.daemon = DaemonProcess(folder, SETTINGS.format(host=host, ktls=str(ktls).lower()))
        self._kernels = ["send"] if ktls else []
        shown = (f"--certificate={host.certificate}", f"--key={host.key}", f"--ca={host.ca}")
        self._options = (*shown, "--verify", *(() if ktls else ("--no-ktls",)))
        self._content = content
        self._moves = 0
        self._memory = folder / "memory"
        self._memory.write_bytes(content)

    def move(self) -> Cost:
        self._moves += 1
        name = f"vm-{self._moves}"
        with (
            Vmm(len(self._content)) as vmm,
            SourceProcess(self.daemon.port, name, "--file", self._memory, options=self._options) as source,
        ):
            vmm.hand_off(self.daemon.socket, name).expect("ready")
            vmm.expect("done")
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            code, told, errors = source.result()
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            assert code == 0, errors
            assert vmm.read(0, pages=PAGES) == self._content
        assert (told["tls"], told["verified"], told["mismatches"]) == ("TLSv1.3", PAGES, 0)
        ended = self.daemon.ended(name)
        for ktls in (told["ktls"], ended["ktls"]):
            assert [way for way in ktls if way != "receive"] == self._kernels  # OpenSSL 3.2 and later may receive, too
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return Cost(ended["running_s"], cpu)


def sessions() -> int:
    """Of which the kernel has ever enciphered what is sent."""
    counted = dict(line.split() for line in Path("/proc/net/tls_stat").read_text().splitlines())
    return int(counted["TlsTxSw"])


def test_a_guest_moves_with_the_kernels_tls_and_without(
    tmp_path: Path, rng: random.Random, lacking: Callable[[str], None], request: pytest.FixtureRequest
) -> None:
    """Alternately, so that what else the host does is in both. The figures are properties of the test: the daemon's
    bytes a second and the source's CPU, with the kernel against without."""
    found = probe_host.ktls()
    if not found.ok:
        lacking(f"network.ktls: {found.why}")
    content = guest_content(rng, PAGES)
    assert len(content) == PAGES * PAGE
    kernel, own = Mover(tmp_path / "kernel", True, content), Mover(tmp_path / "own", False, content)
    with kernel.daemon, own.daemon:
        pairs = []
        for _ in range(REPETITIONS):
            before = sessions()
            with_kernel = kernel.move()
            assert sessions() - before >= 2 * 3  # both ends of the control, the urgent and a background lane
            before = sessions()
            pairs.append((with_kernel, own.move()))
            assert sessions() == before
    faster = median(without.took / with_kernel.took for with_kernel, without in pairs)
    cpu = median(with_kernel.source_cpu / without.source_cpu for with_kernel, without in pairs)
    request.node.user_properties += [("ktls_throughput", round(faster, 2)), ("ktls_source_cpu", round(cpu, 2))]
    print(pairs)
