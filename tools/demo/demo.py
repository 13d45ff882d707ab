"""The whole main job on one machine: a guest on a source VMM, a daemon, a destination VMM, and a sender, over
loopback TCP."""

import argparse
import json
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
from rich.console import Console

from gmemd import status, stopping
from gmemd.errors import GmemdError, UnavailableError, UsageError
from gmemd.migrate.tasks import open_tasks
from gmemd.probe_host import available_memory
from gmemd.show import show
from gmemd_tools.demo import view
from gmemd_tools.demo.cast import Cast
from gmemd_tools.demo.inject import SECONDS, Injection, inject, parse
from gmemd_tools.demo.options import check
from gmemd_tools.demo.plan import MIGRATION, Plan
from gmemd_tools.demo.processes import empty_store, open_stage
from gmemd_tools.network import conditions as network
from gmemd_tools.network.conditions import Conditions
from gmemd_tools.network.link import Link
from gmemd_tools.network.trouble import Troubles

LOOK_SECONDS = 0.05
LEAST_MIB, USUAL_MIB = 16, 1024  # of a guest of no given size

Event = dict[str, Any]


def main(options: argparse.Namespace) -> int:
    """Runs it. Returns 0 only if every page was verified, by the guest and against the source."""
    injections, conditions = _check(options)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="gmemd-demo-") as directory:
        plan = Plan(options, Path(directory), rate=options.memory_bytes // SECONDS if injections else 0)
        try:
            summary = stopping.run(_run, plan, injections, conditions, console)
        except GmemdError as error:
            if not options.json:
                raise
            print(json.dumps({"ok": False, "backing": options.backing, "error": str(error)}))
            return error.exit_code
        finally:
            empty_store(plan.directory)
    if options.json:
        print(json.dumps(summary))
    else:
        show(view.summary(summary))
    return 0 if summary["ok"] else UnavailableError.exit_code


def _fitting() -> str:
    """A power of two that leaves three quarters of what the host has free, as the guest is there twice."""
    free = available_memory().value
    eighth = free // 8 >> 20 if isinstance(free, int) else USUAL_MIB
    return f"{min(USUAL_MIB, 1 << max(LEAST_MIB, eighth).bit_length() - 1)}M"


def _check(options: argparse.Namespace) -> tuple[list[Injection], Conditions]:
    options.memory = options.memory or _fitting()
    check(options)
    conditions = network.parse(options.network or "", options.seed)
    if conditions.kernel:
        raise UsageError("--network by=kernel: gmemd-replay run only")
    return parse(options.inject), conditions


async def _run(plan: Plan, injections: list[Injection], conditions: Conditions, console: Console) -> Event:
    show = view.Live(console, quiet=plan.options.json or not sys.stderr.isatty())
    async with open_stage(plan.directory) as stage, open_tasks() as tasks:
        with show:
            demo = Demo(Cast(plan, stage), show)
            if injections or plan.options.network:
                link = demo.cast.link = Link(plan.port, conditions)
                await tasks.serve(link.run)
                Troubles(conditions, link, demo.others()).start(tasks)
                demo.spoilt = conditions.spoils
            summary = await demo.run(injections)
        tasks.stop()
    return summary


@dataclass
class Demo:
    """One demo, and what was heard in it."""

    cast: Cast
    show: view.Live
    spoilt: bool = False  # the network says what nobody said
    events: dict[str, Event] = field(default_factory=dict)

    async def run(self, injections: list[Injection]) -> Event:
        """From the first process to the last check."""
        cast = self.cast
        await cast.start_daemon()
        self.show.say("the guest fills its memory at the source")
        await cast.start_source()
        await cast.start_destination()
        self.show.say("the guest runs; its memory is about to leave it")
        await cast.start_sender()
        await self._watch(injections)
        self.show.say("everything has arrived; every page is checked")
        await cast.destination.tell("verify", *self.events["paused"]["memory"])
        self.events["verified"] = await cast.destination.event("verified")
        if not (found := await self._look()):
            raise UnavailableError(f"the daemon has nothing to say of the migration: {self.cast.daemon.last_words()}")
        return self._summary(found)

    async def _watch(self, injections: list[Injection]) -> None:
        """From the start of the sender until nothing is missing."""
        destination = self.cast.destination
        async with open_tasks() as tasks:
            if not self.show.quiet:
                tasks.start(self._show)
            self.cast.source.forgiving = True  # its end is told with what it said last, and its exit code
            tasks.start(self.cast.attend_daemon)
            tasks.start(self.cast.attend_sender, self.spoilt)
            tasks.start(inject, injections, self._arrived, self._actions())
            for process, names in ((destination, ("ready", "first-instruction")), (self.cast.source, ("paused",))):
                for name in names:
                    self.events[name] = await process.event(name)
            self.events["done"] = await destination.event("done")
            tasks.stop()
        if self.cast.plan.options.verify:  # which the sender stays for
            await self.cast.sender.process.wait()

    def others(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """What can befall the processes at either end of a network."""
        return {"daemon-kill": self.cast.kill_daemon, "source-kill": self.cast.kill_sender}

    def _actions(self) -> dict[str, Any]:
        return {
            "link-cut": self.cast.cut,
            "link-stall": self.cast.stall,
            "daemon-restart": self.cast.restart_daemon,
            **self.others(),
        }

    async def _arrived(self) -> float:
        found = await self._look()
        if not found or found["phase"] != "running":
            return -1.0
        return float(100 * found["pages_received"] / found["pages"])

    async def _show(self) -> None:
        while True:
            if found := await self._look():
                self.show.migration(found)
            await trio.sleep(LOOK_SECONDS)

    async def _look(self) -> Event:
        """What the daemon says of the migration; nothing while there is no daemon."""
        try:
            told = await trio.to_thread.run_sync(status.ask, self.cast.plan.status_socket, {"command": "status"})
        except GmemdError:
            return {}
        return next((m for m in told["migrations"] + told["finished"] if m["migration"] == MIGRATION), {})

    def _summary(self, migration: Event) -> Event:
        verified, ready, counters = self.events["verified"], self.events["ready"], migration["counters"]
        done = self.events["done"]
        duration_us = done["since_first_instruction_us"]
        latency = migration["fault_latency_us"]
        every_page = verified["pages_verified"] == verified["pages"] and not verified["mismatches"]
        return {
            "ok": bool(verified["ok"]) and every_page and not (migration["verify"] or {}).get("mismatches"),
            "backing": self.cast.plan.options.backing,
            "slot": self.cast.plan.options.slot,
            "guest": verified["guest"],
            "trap": ready["trap"],
            "populate": ready["populate"],
            "memory_bytes": migration["memory_bytes"],
            "pages": verified["pages"],
            "pages_verified": verified["pages_verified"],
            "pages_as_at_source": verified["against_source"],
            "mismatches": verified["mismatches"],
            "faults": counters["faults"],
            "vcpu_exits": done.get("vcpu_exits", 0),
            "prefaulted_pages": done.get("prefaulted_pages", 0),
            "fault_latency_us": {name: latency[name] for name in ("p50", "p90", "p99", "max", "mean")},
            "touch_latency_us": verified["touch_latency_us"],
            "urgent_pages": counters["urgent_pages"],
            "background_pages": counters["background_pages"],
            "zero_pages": counters["zero_pages"],
            "background_bytes_per_s": round(counters["background_bytes"] / duration_us * 1e6),
            "downtime_us": self.events["first-instruction"]["downtime_us"],
            "duration_us": duration_us,
            "recoveries": migration["recoveries"],
            "tls": migration["tls"],
            "ktls": migration["ktls"],
            "verify": migration["verify"],
        }
