"""What runs here: told by the daemon on its status socket, asked by `gmemd status`.

A request is one line of JSON, the answer another.
"""

import json
import os
import socket
import time
from dataclasses import asdict
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import trio

from gmemd import __version__
from gmemd.callers import Caller
from gmemd.errors import DataError, PermissionRefusedError, UnavailableError, reason
from gmemd.migrate.destination import IncomingMigration, Phase
from gmemd.native.destination import Blocked, Wait
from gmemd.places import Places
from gmemd.rates import Speed
from gmemd.registry import Registry

MAX_REQUEST = 4096
MAX_ANSWER = 16 << 20
TIMEOUT = 5.0
MIB = 1 << 20
# Waits that are told one by one, and threads that have waited, longest first; the rest are counted.
WAITS_TOLD = 32
THREADS_TOLD = 512


def one_line(registry: Registry) -> str:
    """For systemctl status."""
    running = [m for m in registry if m.phase is Phase.RUNNING]
    missing = sum(m.memory.pages - m.memory.received for m in running)
    stuck = sum(m.report.stuck is not None for m in running)
    text = f"{len(list(registry))} migrations, {len(running)} running, {missing} pages missing"
    arriving = sum(_speed(m).arrived for m in registry)
    if arriving >= MIB / 10:
        text += f", {arriving / MIB:.1f} MiB/s"
    if stuck:
        text += f", {stuck} stuck"
    return f"{text}, {len(registry.unusable)} unusable" if registry.unusable else text


def sample(registry: Registry) -> None:
    """To be called about once a second, so that there are rates to tell."""
    for migration in registry:
        migration.rates.take(*_counted(migration))


def snapshot(migration: IncomingMigration) -> dict[str, Any]:
    """One migration. Times end in `_us` or `_s`, sizes are bytes. docs/operate.md has all keys."""
    now_ns = time.monotonic_ns()
    report = migration.report
    memory = migration.memory
    waits = migration.destination.waits()
    speed = _speed(migration)
    end = report.completed or time.monotonic()
    return {
        "migration": migration.name,
        "phase": migration.phase.value,
        "trap": memory.trap,
        "populate": sorted({how.value for how in memory.populate.values()}),
        "memory_bytes": memory.size,
        "pages": memory.pages,
        "pages_received": memory.received,
        "progress": round(memory.received / memory.pages, 6),
        "rate_bytes_per_s": round(speed.arrived),
        "faults_per_s": round(speed.faults, 1),
        "eta_s": _eta(migration, speed),
        "running_s": round(end - report.switched, 3) if report.switched else 0.0,
        "epoch": migration.epoch,
        "lanes": sorted(migration.session.lanes) if migration.session else [],
        "recoveries": migration.recoveries,
        "tls": "TLSv1.3" if report.peer else None,
        "ktls": report.ktls,
        "peer": report.peer,
        "stuck": report.stuck,
        "stuck_us": int(1e6 * (end - report.stuck_since)) if report.stuck_since else 0,
        "link": report.link,
        **comparison(migration),
        "fault_latency_us": migration.destination.latency_us(),
        "waits": [
            {
                "region": w.region,
                "page": w.page,
                "thread": w.thread,
                "vcpu": w.vcpu,
                "for_us": (now_ns - w.since_ns) // 1000,
            }
            for w in waits[:WAITS_TOLD]
        ],
        "threads": _threads(migration, waits, now_ns)[:THREADS_TOLD],
        "counters": migration.destination.counters(),
    }


def comparison(migration: IncomingMigration) -> dict[str, Any]:
    """What came of the comparison after the end."""
    verdict = migration.report.verdict
    return {"verify": asdict(verdict) if verdict else None}


def _counted(migration: IncomingMigration) -> tuple[int, int, int]:
    counters = migration.destination.counters()
    arrived = counters["urgent_bytes"] + counters["background_bytes"]
    return migration.memory.received, arrived, counters["faults"]


def _speed(migration: IncomingMigration) -> Speed:
    return Speed() if migration.ended.is_set() else migration.rates.speed(*_counted(migration))


def _eta(migration: IncomingMigration, speed: Speed) -> float | None:
    """Seconds until nothing is missing, if all goes on as now; None if nothing comes."""
    missing = migration.memory.pages - migration.memory.received
    if not missing:
        return 0.0
    return round(missing / speed.pages, 1) if speed.pages else None


def _threads(migration: IncomingMigration, waits: list[Wait], now_ns: int) -> list[dict[str, Any]]:
    """How long each thread has been kept waiting, waits that go on included; longest first."""
    since = {(wait.thread, wait.vcpu): wait.since_ns for wait in reversed(waits)}
    threads = {(t.thread, t.vcpu): t for t in migration.destination.blocked()}
    for key in since:
        threads.setdefault(key, Blocked(*key, waits=0, blocked_ns=0, longest_ns=0))
    told = []
    for key, thread in threads.items():
        waiting_ns = max(now_ns - since[key], 0) if key in since else 0
        told.append(
            {
                "thread": thread.thread,
                "vcpu": thread.vcpu,
                "waits": thread.waits + (key in since),
                "blocked_us": (thread.blocked_ns + waiting_ns) // 1000,
                "longest_us": max(thread.longest_ns, waiting_ns) // 1000,
                "waiting_us": waiting_ns // 1000,
            }
        )
    return sorted(told, key=lambda thread: thread["blocked_us"], reverse=True)


async def serve(stream: trio.SocketStream, registry: Registry, places: Places) -> None:
    """Answers one request; hangs up where a user has too many open."""
    caller = Caller.of(stream.socket)
    async with stream:
        with places.taken(caller.uid) as place:
            if place:
                await _serve(stream, registry, caller)


async def _serve(stream: trio.SocketStream, registry: Registry, caller: Caller) -> None:
    with trio.move_on_after(TIMEOUT):
        try:
            request = await _line(stream)
            answer = json.dumps(answer_untrusted(request, registry, caller)) + "\n"
            await stream.send_all(answer.encode())
        except trio.BrokenResourceError:
            return


async def _line(stream: trio.SocketStream) -> bytes:
    line = b""
    while not line.endswith(b"\n") and len(line) < MAX_REQUEST:
        data = await stream.receive_some(MAX_REQUEST)
        if not data:
            break
        line += data
    return line


def answer_untrusted(request: bytes, registry: Registry, caller: Caller) -> dict[str, Any]:
    """What this caller may see, and what came of what it may do."""
    try:
        asked = json.loads(request)
        command = asked["command"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return {"error": "not a request"}
    if command == "status":
        return {
            "version": __version__,
            "pid": os.getpid(),
            "listen": registry.listen,
            "migrations": [snapshot(migration) for migration in registry if caller.owns(migration.owner)],
            "unusable": [
                {"migration": u.name, "why": u.why, "kept": u.kept}
                for u in registry.unusable.values()
                if caller.owns(u.owner)
            ],
            "waiting": [
                {"migration": name, "source": address}
                for address, name in registry.waiting.items()
                if caller.is_operator
            ],
            "finished": [ended.told for ended in registry.finished if caller.owns(ended.owner)],
        }
    if command == "abandon":
        return _abandon(asked.get("migration"), asked.get("force") is True, registry, caller)
    return {"error": f"no such command: {shown(command)}"}


def _abandon(name: object, force: bool, registry: Registry, caller: Caller) -> dict[str, Any]:
    """Without `force`, not a guest that would come to its end by itself: it would be lost by a slip of the hand."""
    unusable = registry.unusable.get(name) if isinstance(name, str) else None
    if unusable and caller.owns(unusable.owner):
        unusable.given_up.set()
        return {"abandoned": name, "pages_missing": None}
    migration = registry.get(name) if isinstance(name, str) else None
    if migration is None or not caller.owns(migration.owner):
        return {"error": f"no migration {shown(name)} here"}
    missing = migration.memory.pages - migration.memory.received
    if migration.phase is Phase.RUNNING and migration.session and not force:
        has = f"its guest runs here, and its source is here with the {missing} pages that are missing"
        return {"error": f"migration {name}: {has}; --force loses it all the same"}
    migration.report.link = "given up by an operator"
    migration.end(Phase.ABANDONED)
    return {"abandoned": name, "pages_missing": missing}


def ask(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Asks the daemon whose status socket this is."""
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(TIMEOUT)
            sock.connect(str(path))
            sock.sendall(json.dumps(request).encode() + b"\n")
            with sock.makefile("rb") as file:
                line = file.read(MAX_ANSWER)
        if not line.endswith(b"\n"):
            raise UnavailableError(f"{path}: the daemon hung up: it ends, or too many ask it at a time")
        answer = json.loads(line)
    except PermissionError as error:
        raise PermissionRefusedError(f"{path}: user {os.geteuid()} may not ask: {reason(error)}") from None
    except OSError as error:
        raise UnavailableError(f"{path}: no daemon answers: {reason(error)}") from None
    except ValueError as error:
        raise DataError(f"{path}: not an answer of gmemd: {error}") from None
    if not isinstance(answer, dict):
        raise DataError(f"{path}: not an answer of gmemd: {shown(answer)}")
    if "error" in answer:
        raise UnavailableError(answer["error"])
    return answer
