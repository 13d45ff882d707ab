"""Who answers faults goes first, where that is allowed, and only while it answers them."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

from native_rig import until

from gmemd import probe_host
from gmemd.native.destination import Pager


def nice(thread: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, thread)


def test_a_pager_goes_first_while_it_runs() -> None:
    before = nice(0)
    first = probe_host.FIRST_NICE if probe_host.priority().ok else before
    pager = Pager(0)
    with ThreadPoolExecutor(1) as pool:
        thread = pool.submit(threading.get_native_id).result()
        running = pool.submit(pager.run)
        pager.turn()
        until(lambda: pager.turns > 0)
        assert nice(thread) == first
        pager.stop()
        running.result()
        assert nice(thread) == before, "the thread may be given any other work"
    pager.close()
