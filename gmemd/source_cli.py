"""`gmemd-source`: sends a guest's memory to a destination."""

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import trio

from gmemd import __version__, cli, config, log, order, stages, stopping
from gmemd.address import is_loopback, parse_address
from gmemd.credentials import Credentials, Files
from gmemd.errors import DataError, GmemdError, UsageError
from gmemd.learning import Learner
from gmemd.migrate.link import LinkSettings
from gmemd.migrate.source import Destination, OutgoingMigration
from gmemd.migrate.tls import Secured
from gmemd.migrate.wire import MAX_LANES, valid_id
from gmemd.native import keep_secret
from gmemd.native.memory import Verdict
from gmemd.progress import show_progress, tell_trouble
from gmemd.sending import FileGuest, SendingGuest, VmmGuest

MAX_AHEAD = 63  # one frame, with the page that was asked for
MOST_USUAL_LANES = 2
USUAL_LANES = f"one for two CPUs, at most {MOST_USUAL_LANES}"


def usual_lanes() -> int:
    """Each keeps about a CPU busy at either end, and faults and the guest want some, too."""
    return min(MOST_USUAL_LANES, max(1, (os.cpu_count() or 1) // 2))


def address(text: str) -> int:
    return int(text, 0)


def parser() -> argparse.ArgumentParser:
    """All options."""
    top = cli.Parser(
        prog="gmemd-source",
        description="Sends a guest's memory to the host where it goes on running: from a VMM that hands it over, "
        "or from a file that holds it (a snapshot, /proc/PID/fd/N).",
    )
    top.add_argument("destination", metavar="HOST:PORT", help="where gmemd serves; the port defaults to 7575")
    top.add_argument("--migration", required=True, metavar="ID", help="the name that the VMM there uses, too")
    what = top.add_mutually_exclusive_group(required=True)
    what.add_argument("--vmm", type=Path, metavar="SOCKET", help="the VMM's hand-off socket")
    what.add_argument("--file", type=Path, metavar="PATH", help="a memory file, whole, as one region")
    top.add_argument("--gpa", type=address, default=0, metavar="N", help="guest physical address of --file (0)")
    top.add_argument(
        "--lanes", type=int, default=usual_lanes(), metavar="N", help=f"background connections ({USUAL_LANES})"
    )
    top.add_argument(
        "--rate",
        default="0",
        metavar="BYTES/S",
        help="send at most this much in the background, as 100M "
        "(0: no limit); what the guest waits for is never held back",
    )
    top.add_argument(
        "--insist",
        action="store_true",
        help="keep the background at full speed however long the guest waits (default: it gives way)",
    )
    top.add_argument(
        "--ahead",
        type=int,
        default=16,
        metavar="PAGES",
        help="to a guest that walks through memory, send at most so many pages before it asks (16; 0 to 63)",
    )
    top.add_argument(
        "--order",
        type=Path,
        action="append",
        default=[],
        metavar="TRACE",
        help="in the background, send first what the guest needed when this trace was recorded, in that order; "
        "may be repeated, for the files of a rotating trace from the oldest on",
    )
    top.add_argument(
        "--learn",
        type=Path,
        metavar="TRACE",
        help="follow this trace as with --order, if it is there, and add to it what the guest asked for all the same: "
        "for an image that is sent again and again",
    )
    top.add_argument("--no-background", action="store_true", help="send nothing but what the guest there asks for")
    top.add_argument("--no-checksum", action="store_true", help="do not check every frame with a CRC-32C")
    top.add_argument(
        "--verify",
        action="store_true",
        help="after the end, have the destination compare what each page had when it was put in place with what it has "
        "here; a difference ends in exit code 65",
    )
    top.add_argument(
        "--stages", type=Path, metavar="FILE", help="write down when each of the latest faults was answered"
    )
    top.add_argument(
        "--poll-us", type=int, default=100, metavar="N", help="poll this long before sleeping, in µs (100; 0 never)"
    )
    top.add_argument(
        "--patience",
        type=float,
        metavar="SECONDS",
        help="give up after so long without a connection, as long as the guest has not left (default: never)",
    )
    _add_tls(top)
    top.add_argument("--json", action="store_true", help="one JSON object at the end")
    top.add_argument("--version", action="version", version=f"gmemd-source {__version__}")
    top.add_argument("-v", "--verbose", action="store_true", help="tell what the connections do")
    return top


def _add_tls(top: argparse.ArgumentParser) -> None:
    tls = top.add_argument_group("TLS", "Needed for a destination that is not on this host (docs/tls.md).")
    tls.add_argument("--certificate", type=Path, metavar="PEM", help="what we show, with the chain of its issuers")
    tls.add_argument("--key", type=Path, metavar="PEM", help="the certificate's; nobody else may be able to read it")
    tls.add_argument("--ca", type=Path, metavar="PEM", help="where the destination's certificate must come from")
    tls.add_argument(
        "--crl", type=Path, metavar="PEM", help="what the authorities have revoked; one list of each has to be there"
    )
    tls.add_argument("--psk", type=Path, metavar="FILE", help="name:key in hex digits, in place of certificates")
    tls.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that the destination's certificate may have; may be repeated (the HOST)",
    )
    tls.add_argument("--no-ktls", action="store_true", help="encipher here, even if the kernel can do it")
    tls.add_argument(
        "--tls",
        choices=("auto", "require", "off"),
        default="auto",
        help="auto: required, but for a destination on this host when nothing is given to show (auto)",
    )
    tls.add_argument(
        "--plain-text-on-network",
        action="store_true",
        help="with --tls off, send the guest's memory over the network as plain text",
    )


def _secured(options: argparse.Namespace, host: str) -> Secured | None:
    """How to connect: None for plain text."""
    try:
        pem = {"certificate": options.certificate, "key": options.key, "ca": options.ca}
        config.check_files(pem, options.crl, "--")
    except ValueError as error:
        raise UsageError(str(error)) from None
    files = Files(
        certificate=options.certificate,
        key=options.key,
        ca=options.ca,
        crl=options.crl,
        psk=options.psk,
        ktls=not options.no_ktls,
    )
    mode = options.tls
    if mode == "auto":
        mode = "require" if files or not is_loopback(host) else "off"
    elif mode == "off" and not is_loopback(host):
        if not options.plain_text_on_network:
            raise UsageError(f"--tls off sends guest memory to {host} as plain text: --plain-text-on-network, too?")
        logging.getLogger(__name__).warning("guest memory goes to %s as plain text, to whoever answers there", host)
    if mode == "off":
        return None
    if not files:
        raise UsageError(f"{host} is on the network, which needs TLS: --certificate, --key and --ca, or --psk")
    if files.certificate and files.psk:
        raise UsageError("--psk is in place of --certificate, --key and --ca")
    return Secured(Credentials(files, server=False).context, options.peer or [host])


def _to(options: argparse.Namespace) -> Destination:
    text = options.destination
    try:
        host, port = parse_address(text if text.rpartition(":")[1] and text[-1] != "]" else f"{text}:7575")
    except ValueError as error:
        raise UsageError(f"{text}: {error}") from None
    if not valid_id(options.migration):
        raise UsageError(f"--migration {options.migration!r}: 1 to 63 of letters, digits and -_.")
    if not 1 <= options.lanes <= MAX_LANES:
        raise UsageError(f"--lanes {options.lanes}: 1 to {MAX_LANES}")
    if not 0 <= options.gpa < 2**63:
        raise UsageError(f"--gpa {options.gpa:#x}: 0 to 2^63 - 1")
    if not 0 <= options.ahead <= MAX_AHEAD:
        raise UsageError(f"--ahead {options.ahead}: 0 to {MAX_AHEAD}")
    if not 0 <= options.poll_us <= 1000:
        raise UsageError(f"--poll-us {options.poll_us}: 0 to 1000")
    if options.patience is not None and not options.patience >= 0:  # nan, too
        raise UsageError(f"--patience {options.patience}: 0 or more")
    secured = _secured(options, host)
    return Destination(
        host,
        port,
        options.migration,
        options.lanes,
        background=not options.no_background,
        secured=secured,
        verify=options.verify,
    )


async def _send(options: argparse.Namespace) -> tuple[dict[str, Any], Verdict]:
    to = _to(options)
    try:
        rate = config.parse_size(options.rate)
    except ValueError as error:
        raise UsageError(f"--rate {options.rate}: {error}") from None
    orders = [*options.order, *([options.learn] if options.learn and options.learn.exists() else [])]
    order.must_be_traces(orders)
    settings = LinkSettings(checksum=not options.no_checksum, poll_us=options.poll_us, ahead=options.ahead)
    guest: SendingGuest
    async with VmmGuest(options.vmm, to.migration) if options.vmm else FileGuest(options.file, options.gpa) as guest:
        migration = OutgoingMigration(to, guest.memory(to.migration), guest, settings)
        migration.source.set_rate(rate)
        migration.source.set_giveway(not options.insist)
        if options.stages:
            migration.memory.time_stages()
        try:
            if orders:
                migration.source.follow(order.read(orders, migration.memory))
            async with trio.open_nursery() as nursery:
                if options.learn:
                    learner = Learner(options.learn, migration)
                    nursery.start_soon(learner.run)
                seen = sys.stderr.isatty() and not options.json
                nursery.start_soon(show_progress if seen else tell_trouble, migration)
                await migration.run(options.patience)
                nursery.cancel_scope.cancel()
            await guest.done()
            if options.learn:
                learner.keep()
            if options.verify and migration.progress.verdict is None:
                why = migration.progress.trouble or "the destination has not done it"
                logging.getLogger(__name__).warning("complete, and not compared: %s", why)
            return _summary(migration), migration.progress.verdict or Verdict()
        except* GmemdError as group:
            await guest.failed(str(group.exceptions[0]), resume=migration.may_resume)
            raise
        finally:
            if options.stages:
                stages.write(options.stages, migration.memory)
            migration.close()


def _summary(migration: OutgoingMigration) -> dict[str, Any]:
    progress = migration.progress
    return {
        "ok": True,
        "migration": migration.to.migration,
        "memory_bytes": migration.memory.size,
        "pages": migration.memory.pages,
        "duration_us": round(((progress.completed or time.monotonic()) - progress.started) * 1e6),
        "recoveries": progress.recoveries,
        "tls": None if progress.ktls is None else "TLSv1.3",
        "ktls": progress.ktls,
        **migration.source.counters(),
        **_comparison(migration),
    }


def _comparison(migration: OutgoingMigration) -> dict[str, int | bool]:
    if not migration.to.verify:
        return {}
    verdict = migration.progress.verdict or Verdict(left_out=migration.memory.pages)
    return {
        "ok": not verdict.mismatches,
        "verified": verdict.verified,
        "left_out": verdict.left_out,
        "mismatches": verdict.mismatches,
    }


def send(options: argparse.Namespace) -> int:
    log.set_up(logging.INFO if options.verbose else logging.WARNING)
    keep_secret()
    summary, verdict = stopping.run(_send, options)
    if options.json:
        print(json.dumps(summary))
    if verdict.mismatches:
        raise DataError(f"migration {options.migration}: {verdict}: found by the destination")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The console script."""
    return cli.run(parser(), send, arguments)


if __name__ == "__main__":
    sys.exit(main())
