"""The whole main job on one machine: a guest on a source VMM, a daemon, a destination VMM, and a sender, over
loopback TCP."""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
from rich.console import Console

from gmemd import config, status
from gmemd.errors import GmemdError, UnavailableError, UsageError
from gmemd.migrate.tasks import open_tasks
from gmemd_tools.demo import view
from gmemd_tools.demo.inject import SECONDS, Injection, inject, parse
from gmemd_tools.demo.link import Link
from gmemd_tools.demo.plan import MIGRATION, Plan
from gmemd_tools.demo.processes import Process, Stage, open_stage

READY_SECONDS = 30.0
LOOK_SECONDS = 0.05
# Longer than it takes both ends to find a stalled link dead.
STALL_SECONDS = 2.0
MAX_VCPUS = 8

Event = dict[str, Any]


def main(options: argparse.Namespace) -> int:
    """Runs it. Returns 0 only if every page was verified, by the guest and against the source."""
    injections = _check(options)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="gmemd-demo-") as directory:
        plan = Plan(options, Path(directory), rate=options.memory_bytes // SECONDS if injections else 0)
        try:
            summary = trio.run(_run, plan, injections, console)
        except GmemdError as error:
            if not options.json:
                raise
            print(json.dumps({"ok": False, "backing": options.backing, "error": str(error)}))
            return error.exit_code
    if options.json:
        print(json.dumps(summary))
    else:
        Console().print(view.summary(summary))
    return 0 if summary["ok"] else UnavailableError.exit_code


def _check(options: argparse.Namespace) -> list[Injection]:
    try:
        options.memory_bytes = config.parse_size(options.memory)
    except ValueError as error:
        raise UsageError(f"--memory {options.memory}: {error}") from None
    if not 1 <= options.vcpus <= MAX_VCPUS:
        raise UsageError(f"--vcpus {options.vcpus}: 1 to {MAX_VCPUS}")
    return parse(options.inject)


async def _run(plan: Plan, injections: list[Injection], console: Console) -> Event:
    show = view.Live(console, quiet=plan.options.json or not sys.stderr.isatty())
    async with open_stage(plan.directory) as stage, open_tasks() as tasks:
        with show:
            demo = Demo(plan, stage, show)
            if injections:
                demo.link = Link(plan.port)
                await tasks.serve(demo.link.run)
            summary = await demo.run(injections)
        tasks.stop()
    return summary


@dataclass
class Demo:
    """The processes of one demo, and what is done with them."""

    plan: Plan
    stage: Stage
    show: view.Live
    link: Link | None = None
    events: dict[str, Event] = field(default_factory=dict)
    daemon: Process = field(init=False)
    source: Process = field(init=False)
    destination: Process = field(init=False)
    sender: Process = field(init=False)

    async def run(self, injections: list[Injection]) -> Event:
        """From the first process to the last check."""
        stage, plan = self.stage, self.plan
        await self._start_daemon()
        self.show.say("the guest fills its memory at the source")
        self.source = await stage.vmm("source", *plan.source())
        await self.source.event("running")
        self.destination = await stage.vmm("destination", *plan.destination())
        self.show.say("the guest runs; its memory is about to leave it")
        await self._start_sender()
        await self._watch(injections)
        self.show.say("everything has arrived; every page is checked")
        await self.destination.tell("verify", *self.events["paused"]["memory"])
        self.events["verified"] = await self.destination.event("verified")
        return self._summary(await self._look())

    async def _start_daemon(self) -> None:
        """Starts the daemon and waits until it is ready, as a service manager would."""
        path = self.plan.directory / "notify.sock"
        path.unlink(missing_ok=True)
        with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_DGRAM) as notify:
            await notify.bind(str(path))
            self.daemon = await self.stage.python(
                "daemon", "gmemd.cli", *self.plan.daemon(), environ={"NOTIFY_SOCKET": str(path)}
            )
            with trio.move_on_after(READY_SECONDS):
                while b"READY=1" not in await notify.recv(4096):
                    pass
                return
        raise UnavailableError("the daemon does not become ready")

    async def _start_sender(self) -> None:
        port = self.link.port if self.link else self.plan.port
        self.sender = await self.stage.python("sender", "gmemd.source_cli", *self.plan.sender(port))

    async def _watch(self, injections: list[Injection]) -> None:
        """From the start of the sender until nothing is missing."""
        async with open_tasks() as tasks:
            if not self.show.quiet:
                tasks.start(self._show)
            tasks.start(inject, injections, self._arrived, self._actions())
            for process, names in ((self.destination, ("ready", "first-instruction")), (self.source, ("paused",))):
                for name in names:
                    self.events[name] = await process.event(name)
            self.events["done"] = await self.destination.event("done")
            tasks.stop()

    def _actions(self) -> dict[str, Any]:
        return {
            "link-cut": self._cut,
            "link-stall": self._stall,
            "daemon-kill": self._kill_daemon,
            "daemon-restart": self._restart_daemon,
            "source-kill": self._kill_sender,
        }

    async def _cut(self) -> None:
        assert self.link
        self.link.cut()

    async def _stall(self) -> None:
        assert self.link
        self.link.stall()
        await trio.sleep(STALL_SECONDS)
        self.link.heal()

    async def _kill_daemon(self) -> None:
        self.daemon.process.kill()
        await self.daemon.process.wait()
        await self._start_daemon()

    async def _restart_daemon(self) -> None:
        await self.stage.end(self.daemon)
        await self._start_daemon()

    async def _kill_sender(self) -> None:
        self.sender.process.kill()
        await self.sender.process.wait()
        await self._start_sender()

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
            told = await trio.to_thread.run_sync(status.ask, self.plan.status_socket, {"command": "status"})
        except GmemdError:
            return {}
        return next((m for m in told["migrations"] + told["finished"] if m["migration"] == MIGRATION), {})

    def _summary(self, migration: Event) -> Event:
        verified, ready, counters = self.events["verified"], self.events["ready"], migration["counters"]
        duration_us = self.events["done"]["since_first_instruction_us"]
        latency = migration["fault_latency_us"]
        every_page = verified["pages_verified"] == verified["pages"] and not verified["mismatches"]
        return {
            "ok": bool(verified["ok"]) and every_page,
            "backing": self.plan.options.backing,
            "guest": verified["guest"],
            "trap": ready["trap"],
            "populate": ready["populate"],
            "memory_bytes": migration["memory_bytes"],
            "pages": verified["pages"],
            "pages_verified": verified["pages_verified"],
            "pages_as_at_source": verified["against_source"],
            "mismatches": verified["mismatches"],
            "faults": counters["faults"],
            "fault_latency_us": {name: latency[name] for name in ("p50", "p90", "p99", "max", "mean")},
            "touch_latency_us": verified["touch_latency_us"],
            "urgent_pages": counters["urgent_pages"],
            "background_pages": counters["background_pages"],
            "zero_pages": counters["zero_pages"],
            "background_bytes_per_s": round(counters["background_bytes"] / duration_us * 1e6),
            "downtime_us": self.events["first-instruction"]["downtime_us"],
            "duration_us": duration_us,
            "recoveries": migration["recoveries"],
            "tls": "off",
        }
