"""The whole main job on one machine: a guest on a source VMM, a daemon, a destination VMM, and a sender, over loopback TCP."""

import argparse
import json
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio
from rich.console import Console

from gmemd import config, status
from gmemd.errors import GmemdError, UnavailableError, UsageError
from gmemd.migrate.tasks import open_tasks
from gmemd_tools.demo import view
from gmemd_tools.demo.processes import Process, Stage, open_stage

MIGRATION = "demo"
READY_SECONDS = 30.0
LOOK_SECONDS = 0.05
MAX_VCPUS = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """A demo, as asked for."""

    options: argparse.Namespace
    directory: Path

    @property
    def daemon_socket(self) -> Path:
        return self.directory / "gmemd.sock"

    @property
    def status_socket(self) -> Path:
        return self.directory / "status.sock"

    @property
    def source_socket(self) -> Path:
        return self.directory / "source.sock"

    def machine(self) -> list[str]:
        """What both VMMs must agree on."""
        o = self.options
        return [
            f"--memory={o.memory}",
            f"--vcpus={o.vcpus}",
            f"--regions={o.regions}",
            f"--backing={o.backing}",
            f"--guest={o.guest}",
        ]

    def workload(self) -> list[str]:
        """What the guest does."""
        return [f"--pattern={self.options.pattern}", f"--seed={self.options.seed}"]

    def write_config(self) -> Path:
        """The daemon's configuration."""
        path = self.directory / "gmemd.toml"
        trace = f'directory = "{Path(self.options.trace).absolute()}"' if self.options.trace else ""
        path.write_text(
            f"""[daemon]
socket = "{self.daemon_socket}"
status_socket = "{self.status_socket}"
[network]
listen = "127.0.0.1:0"
[paging]
populate = "{self.options.populate}"
[trace]
{trace}
"""
        )
        return path


def main(options: argparse.Namespace) -> int:
    """Runs it. Returns 0 only if every page was verified, by the guest and against the source."""
    _check(options)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="gmemd-demo-") as directory:
        plan = Plan(options, Path(directory))
        try:
            summary = trio.run(_run, plan, console)
        except GmemdError as error:
            if not options.json:
                raise
            summary = {"ok": False, "backing": options.backing, "error": str(error)}
            print(json.dumps(summary))
            return error.exit_code
    if options.json:
        print(json.dumps(summary))
    else:
        Console().print(view.summary(summary))
    return 0 if summary["ok"] else UnavailableError.exit_code


def _check(options: argparse.Namespace) -> None:
    try:
        config.parse_size(options.memory)
    except ValueError as error:
        raise UsageError(f"--memory {options.memory}: {error}") from None
    if not 1 <= options.vcpus <= MAX_VCPUS:
        raise UsageError(f"--vcpus {options.vcpus}: 1 to {MAX_VCPUS}")


async def _run(plan: Plan, console: Console) -> dict[str, Any]:
    show = view.Live(console, quiet=plan.options.json or not sys.stderr.isatty())
    async with open_stage(plan.directory) as stage:
        with show:
            port = await _start_daemon(stage, plan)
            show.say("the guest fills its memory at the source")
            source = await stage.vmm("source", "source", f"--listen={plan.source_socket}", *plan.machine(), *plan.workload())
            await source.event("running")
            destination = await _start_destination(stage, plan)
            show.say("the guest runs; its memory is about to leave it")
            sender = await stage.python(
                "sender",
                "gmemd.source_cli",
                f"127.0.0.1:{port}",
                f"--migration={MIGRATION}",
                f"--vmm={plan.source_socket}",
                f"--lanes={plan.options.lanes}",
                "--json",
            )
            events = await _watch(plan, show, source, destination, sender)
            show.say("everything has arrived; every page is checked")
            await destination.tell("verify", *events["paused"]["memory"])
            events["verified"] = await destination.event("verified")
            told = await trio.to_thread.run_sync(status.ask, plan.status_socket, {"command": "status"})
    return _summary(plan, events, _find(told))


async def _start_daemon(stage: Stage, plan: Plan) -> int:
    """Starts the daemon and waits until it is ready, as a service manager would. Returns its TCP port."""
    path = plan.directory / "notify.sock"
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        await notify.bind(str(path))
        await stage.python(
            "daemon", "gmemd.cli", "serve", f"--config={plan.write_config()}", environ={"NOTIFY_SOCKET": str(path)}
        )
        with trio.move_on_after(READY_SECONDS):
            while b"READY=1" not in await notify.recv(4096):
                pass
            told = await trio.to_thread.run_sync(status.ask, plan.status_socket, {"command": "status"})
            return int(told["listen"].rpartition(":")[2])
    raise UnavailableError("the daemon does not become ready")


async def _start_destination(stage: Stage, plan: Plan) -> Process:
    return await stage.vmm(
        "destination",
        "destination",
        f"--gmemd={plan.daemon_socket}",
        f"--migration={MIGRATION}",
        *plan.machine(),
    )


async def _watch(
    plan: Plan, show: view.Live, source: Process, destination: Process, sender: Process
) -> dict[str, dict[str, Any]]:
    """From the start of the sender until nothing is missing."""
    events: dict[str, dict[str, Any]] = {}

    async def look() -> None:
        while True:
            told = await trio.to_thread.run_sync(status.ask, plan.status_socket, {"command": "status"})
            if found := _find(told):
                show.migration(found)
            await trio.sleep(LOOK_SECONDS)

    async with open_tasks() as tasks:
        if not show.quiet:
            tasks.start(look)
        events["ready"] = await destination.event("ready")
        events["first"] = await destination.event("first-instruction")
        events["paused"] = await source.event("paused")
        events["done"] = await destination.event("done")
        events["sent"] = await sender.result()
        tasks.stop()
    return events


def _find(told: dict[str, Any]) -> dict[str, Any]:
    return next((m for m in told["migrations"] + told["finished"] if m["migration"] == MIGRATION), {})


def _summary(plan: Plan, events: dict[str, dict[str, Any]], migration: dict[str, Any]) -> dict[str, Any]:
    verified, counters = events["verified"], migration["counters"]
    duration_us = events["done"]["since_first_instruction_us"]
    latency = migration["fault_latency_us"]
    return {
        "ok": bool(verified["ok"]) and verified["pages_verified"] == verified["pages"] and not verified["mismatches"],
        "backing": plan.options.backing,
        "guest": verified["guest"],
        "trap": events["ready"]["trap"],
        "populate": events["ready"]["populate"],
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
        "downtime_us": events["first"]["downtime_us"],
        "duration_us": duration_us,
        "recoveries": migration["recoveries"],
        "tls": "off",
    }
