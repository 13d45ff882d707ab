"""One run: a small migration, a fault or two, and at the end the guest checks every page of its memory."""

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import trio

from gmemd import status
from gmemd.errors import GmemdError, UnavailableError
from gmemd.migrate.tasks import Tasks, open_tasks
from gmemd_tools import tmpfs
from gmemd_tools.demo.cast import Cast
from gmemd_tools.demo.options import usual
from gmemd_tools.demo.plan import MIGRATION, Plan
from gmemd_tools.demo.processes import Process, empty_store, open_stage
from gmemd_tools.network.link import Link
from gmemd_tools.soak.faults import Fault, draw

LOOK_SECONDS = 0.01
LAST_WORDS_SECONDS = 5.0
MIB = 1 << 20
MEMORY_MIB = 16
# Bytes/s of the background; 0 is no limit.
RATES = (0, 40 * MIB, 120 * MIB)


@dataclass(slots=True)
class Result:
    """What came of one run. `struck`: faults that came before the end."""

    kind: str
    seed: int
    ok: bool = False
    seconds: float = 0.0
    struck: int = 0
    recoveries: int = 0
    faults: list[dict[str, Any]] = field(default_factory=list)
    guest: str = ""
    error: str = ""
    kept: str = ""  # where the logs of a failed run are


async def run(kind: str, seed: int, deadline: float, keep: Path) -> Result:
    """Everything about it follows from its kind and its seed. It ends in about `deadline` seconds, either way, and
    leaves its logs in `keep` if that was the wrong one."""
    rng = random.Random(f"{kind} {seed}")
    result = Result(kind, seed)
    faults = draw(kind, MEMORY_MIB * MIB, rng)
    result.faults = [asdict(fault) for fault in faults]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gmemd-soak-") as directory:
        plan = Plan(machine(rng), Path(directory), rate=rng.choice(RATES))
        try:
            await _play(plan, faults, result, deadline)
            result.ok = True
        except GmemdError as error:
            result.error = str(error)
        finally:
            empty_store(plan.directory)
        if not result.ok:
            result.kept = str(keep / f"{kind}-{seed}")
            shutil.copytree(directory, result.kept, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.sock"))
    result.seconds = round(time.monotonic() - begin, 3)
    return result


def machine(rng: random.Random) -> argparse.Namespace:
    """A small one, of any kind, drawn alike on every host: one without tmpfs plays memfd in its place."""
    drawn = usual(
        memory=f"{MEMORY_MIB}M",
        vcpus=rng.randint(1, 2),
        regions=rng.choice((1, 1, 3)),
        backing=rng.choice(("memfd", "tmpfs")),
        guest=rng.choice(("auto", "auto", "threads")),
        pattern=rng.choice(("random", "sequential", "hotset")),
        lanes=rng.randint(1, 3),
        populate=rng.choice(("auto", "recv", "copy")),
        seed=rng.randrange(1, 1 << 31),
    )
    if tmpfs.missing():
        drawn.backing = "memfd"
    return drawn


async def _play(plan: Plan, faults: list[Fault], result: Result, deadline: float) -> None:
    async with open_stage(plan.directory) as stage, open_tasks() as relay:
        link = Link(plan.port)
        await relay.serve(link.run)
        cast = Cast(plan, stage, link)
        try:
            with trio.fail_after(deadline):
                await _migrate(plan, cast, faults, result)
        except trio.TooSlowError:
            raise UnavailableError(f"not over after {deadline:g} s: {await where_it_is(plan, cast)}") from None
        relay.stop()


async def _migrate(plan: Plan, cast: Cast, faults: list[Fault], result: Result) -> None:
    async with open_tasks() as starting:
        starting.start(cast.start_daemon)
        starting.start(cast.start_source)
    await cast.start_destination()
    await until_known(plan)
    assert cast.link is not None
    async with open_tasks() as repairs:
        for fault in faults:
            cast.link.at(fault.byte, _act(fault, cast, repairs, result))
        await cast.start_sender()
        ready = await cast.destination.event("ready")
        paused = await cast.source.event("paused")
        await cast.destination.event("done")
    result.recoveries = max(await sender_ended(cast), await _recoveries(plan))
    result.guest = ready["guest"]
    await verify(cast.destination, paused["memory"])


async def where_it_is(plan: Plan, cast: Cast) -> str:
    """What the daemon has to say, and which of the processes still run."""
    told = "the daemon does not answer"
    with suppress(GmemdError), trio.move_on_after(LAST_WORDS_SECONDS):
        found = await trio.to_thread.run_sync(
            status.ask, plan.status_socket, {"command": "status"}, abandon_on_cancel=True
        )
        told = json.dumps(found["migrations"] or found["finished"])
    codes = [f"{process.name} {process.process.poll()}" for process in cast.stage.processes]
    return f"{', '.join(codes)}; {told}"


def _act(fault: Fault, cast: Cast, repairs: Tasks, result: Result) -> Callable[[], None]:
    """What the link calls when it is time: the blow at once, and what becomes of it in a task."""
    link = cast.link
    assert link is not None
    blows: dict[str, tuple[Callable[[], None], Any]] = {
        "link-cut": (link.cut, None),
        "link-stall": (link.stall, lambda: _heal(link, fault.seconds)),
        "half-open": (link.go_silent, None),
        "daemon-kill": (lambda: cast.daemon.process.kill(), cast.kill_daemon),
        "daemon-restart": (lambda: cast.daemon.process.terminate(), cast.restart_daemon),
        "source-kill": (lambda: cast.sender.process.kill(), cast.kill_sender),
    }
    blow, repair = blows[fault.kind]

    def act() -> None:
        result.struck += 1
        blow()
        if repair:
            repairs.start(repair)

    return act


async def _heal(link: Link, seconds: float) -> None:
    await trio.sleep(seconds)
    link.heal()


async def until_known(plan: Plan) -> None:
    """The daemon has taken the hand-off: a VMM whose daemon dies before that starts anew."""
    while True:
        with suppress(GmemdError):
            told = await trio.to_thread.run_sync(status.ask, plan.status_socket, {"command": "status"})
            if told["migrations"]:
                return
        await trio.sleep(LOOK_SECONDS)


async def _recoveries(plan: Plan) -> int:
    """As the daemon counted them; it does not know any more if it was started anew after the end."""
    with suppress(GmemdError):
        told = await trio.to_thread.run_sync(status.ask, plan.status_socket, {"command": "status"})
        return sum(ended["recoveries"] for ended in told["finished"] if ended["migration"] == MIGRATION)
    return 0


async def sender_ended(cast: Cast) -> int:
    """The sender hears that the destination has everything; one that was started too late, that it is over. Returns
    how often it had to connect again."""
    code = await cast.sender.process.wait()
    if code == os.EX_OK:
        return int((await cast.sender.result())["recoveries"])
    said = cast.sender.log.read_text(errors="replace")
    if code == os.EX_PROTOCOL and "ended here" in said and said.rstrip().endswith("complete"):
        return 0
    raise UnavailableError(f"the sender ended with {code}: {said.strip().splitlines()[-1:]}")


async def verify(destination: Process, memory: list[str]) -> None:
    """The guest looks at all its memory. UnavailableError unless it is as it has to be."""
    await destination.tell("verify", *memory)
    told = await destination.event("verified")
    if not told["ok"] or told["mismatches"] or told["pages_verified"] != told["pages"]:
        raise UnavailableError(f"the guest found its memory wrong: {told}")
