"""`gmemd-replay`: the command line."""

import argparse
import json
import logging
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from gmemd import __version__, cli, log, order
from gmemd.errors import DataError, UnavailableError, UsageError
from gmemd.native.memory import Region
from gmemd.trace import TraceWriter
from gmemd_tools.demo.options import output_directory
from gmemd_tools.network import conditions
from gmemd_tools.replay import comparison, patterns, result, runfile, summary
from gmemd_tools.replay.comparison import compare as compare_setups
from gmemd_tools.replay.handler import Handler
from gmemd_tools.replay.recording import load
from gmemd_tools.replay.run import replay
from gmemd_tools.replay.setup import Setup

BASE_PAGE = 4096
MOST_RUNS = 2
N = TypeVar("N", int, float)


def show(options: argparse.Namespace) -> int:
    found = summary.summarise(load(options.traces))
    print(json.dumps(found) if options.json else summary.text(found))
    return 0


def synth(options: argparse.Namespace) -> int:
    plan = patterns.Plan(
        pages=options.pages,
        threads=options.threads,
        faults=options.faults,
        gap_ns=round(options.gap_us * 1000),
        writes=options.writes,
        seed=options.seed,
    )
    region = Region(offset=0, size=options.pages * options.page_size, page_size=options.page_size, gpa=0)
    try:
        with TraceWriter(options.output, f"synth-{options.pattern}", [region]) as writer:
            writer.add(patterns.synthesise(options.pattern, plan))
    except OSError as error:
        raise DataError(f"{options.output}: {error.strerror}") from None
    return 0


def record(options: argparse.Namespace) -> int:
    log.set_up(logging.INFO)
    content = f"--file={options.file.absolute()}" if options.file else f"--vmm={options.vmm.absolute()}"
    handler = Handler(
        socket=options.socket.absolute(),
        content=content,
        migration=options.migration,
        traces=output_directory(options.output).absolute(),
        seconds=options.seconds,
        source_arguments=options.source,
    )
    found = summary.summarise(handler.record())
    print(json.dumps(found) if options.json else summary.text(found))
    return 0


def merge(options: argparse.Namespace) -> int:
    order.merge(options.traces, options.output)
    return 0


def run(options: argparse.Namespace) -> int:
    setup = _setup(options)
    found = replay(load(options.traces), setup, options.output)
    print(json.dumps(found) if options.json else result.text(found))
    return 0 if found["ok"] else DataError.exit_code


def compare(options: argparse.Namespace) -> int:
    before = _setup(options)
    against = _against(options, before)
    if against == before:
        raise UsageError("compare: say what is different, with --against-set, -source, -network or -programs")
    found = compare_setups(load(options.traces), before, against, options.rounds, options.output)
    print(json.dumps(found) if options.json else comparison.text(found))
    return 0


def report(options: argparse.Namespace) -> int:
    if len(options.runs) > MOST_RUNS:
        raise UsageError("report: one run, or two to be compared")
    runs = [runfile.read(path) for path in options.runs]
    try:
        from gmemd_tools.report import page
    except ModuleNotFoundError as error:
        raise UnavailableError(f"{error.name} is not installed: pip install 'gmemd[report]'") from None
    page.write(runs, options.output, options.png)
    return 0


def _setup(options: argparse.Namespace) -> Setup:
    return Setup(
        speed=None if options.flat_out else options.speed,
        on_demand=options.on_demand,
        seed=options.seed,
        settings=_settings(options.settings),
        source_arguments=options.source,
        programs=options.programs,
        network=_network(options.network, options.seed),
    )


def _against(options: argparse.Namespace, base: Setup) -> Setup:
    """The same, but for what is different."""
    settings = {table: {**values} for table, values in base.settings.items()}
    for table, values in _settings(options.against_settings).items():
        settings.setdefault(table, {}).update(values)
    return replace(
        base,
        settings=settings,
        source_arguments=[*base.source_arguments, *options.against_source],
        programs=options.against_programs or base.programs,
        network=_network(options.against_network, options.seed) or base.network,
    )


def _network(text: str | None, seed: int) -> conditions.Conditions | None:
    return None if text is None else conditions.parse(text, seed)


def _settings(given: list[str]) -> dict[str, dict[str, Any]]:
    """Reads TABLE.KEY=VALUE, the value as TOML has it, or else a string."""
    settings: dict[str, dict[str, Any]] = {}
    for text in given:
        name, equals, value = text.partition("=")
        table, dot, key = name.partition(".")
        if not (equals and dot and table and key):
            raise UsageError(f"--set {text}: must be TABLE.KEY=VALUE, such as paging.poll_us=0")
        settings.setdefault(table, {})[key] = _toml(value)
    return settings


def _toml(value: str) -> object:
    try:
        read = tomllib.loads(f"value = {value}")["value"]
        json.dumps(read)  # which is how it is written down; times are not for it, nor are they settings
        return read
    except (tomllib.TOMLDecodeError, TypeError):
        return value


def _number(kind: Callable[[str], N], low: N, high: N) -> Callable[[str], N]:
    def number(text: str) -> N:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: from {low} to {high}")
        return value

    return number


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = cli.Parser(prog="gmemd-replay", description="Plays recorded faults against a daemon and a source.")
    top.add_argument("--version", action="version", version=f"gmemd-replay {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=cli.Parser)

    def add(name: str, main: cli.Command, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(main=main)
        return command

    traces: dict[str, Any] = {"nargs": "+", "type": Path, "metavar": "TRACE"}
    command = add("show", show, "Tell what is in a trace.")
    command.add_argument("traces", **traces, help="one file, or those of a rotating trace, oldest first")
    command.add_argument("--json", action="store_true", help="one JSON object")

    command = add("synth", synth, "Make a trace of a well-known pattern.")
    command.add_argument("pattern", choices=list(patterns.PATTERNS))
    command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    command.add_argument("--pages", type=_number(int, 1, 1 << 28), default=16384, help="of the guest (16384)")
    command.add_argument("--page-size", type=int, choices=(BASE_PAGE, 2 << 20), default=BASE_PAGE)
    command.add_argument("--threads", type=_number(int, 1, 1024), default=2, help="(2)")
    command.add_argument("--faults", type=_number(int, 1, 1 << 30), default=10000, help="of all threads (10000)")
    command.add_argument(
        "--gap-us", type=_number(float, 0, 1e9), default=50.0, help="between two accesses of a thread, on average (50)"
    )
    command.add_argument("--writes", type=_number(float, 0, 1), default=0.3, help="the share of writes (0.3)")
    command.add_argument("--seed", type=_number(int, 0, 1 << 63), default=1)

    command = add("record", record, "Serve a VMM's faults from a file or another VMM, and record them.")
    command.add_argument("--socket", type=Path, required=True, metavar="PATH", help="where the VMM hands over")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--file", type=Path, metavar="PATH", help="the file that holds the guest's memory")
    what.add_argument("--vmm", type=Path, metavar="SOCKET", help="or the hand-off socket of a VMM that has it")
    command.add_argument("--migration", default="recording", metavar="ID", help="as the VMM calls it (recording)")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="ID.0.gmtrace, … come there")
    command.add_argument(
        "--seconds",
        type=_number(float, 0.1, 1e6),
        metavar="N",
        help="so long after the guest began to run, send it the rest and end (default: on Ctrl-C)",
    )
    command.add_argument("--source", action="append", default=[], metavar="ARGUMENT", help="for gmemd-source")
    command.add_argument("--json", action="store_true", help="what show tells of the trace, as one JSON object")

    command = add("merge", merge, "Make one trace of several of one image, for gmemd-source --order.")
    command.add_argument("traces", **traces, help="of guests with the same regions")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="may be one of them")

    command = add("run", run, "Play a trace against a daemon and a source, and check every page.")
    command.add_argument("traces", **traces, help="one file, or those of a rotating trace, oldest first")
    _add_setup(command)
    command.add_argument("-o", "--output", type=Path, metavar="FILE", help="keep the run there, for a report")
    command.add_argument("--json", action="store_true", help="one JSON object")

    command = add("compare", compare, "Play a trace in two ways by turns, and tell the difference.")
    command.add_argument("traces", **traces, help="one file, or those of a rotating trace, oldest first")
    _add_setup(command)
    _add_ways(command, "against-")
    command.add_argument("--rounds", type=_number(int, 1, 100), default=3, metavar="N", help="of both (3)")
    command.add_argument("-o", "--output", type=Path, metavar="DIR", help="keep the runs there: a1.gmrun, b1.gmrun, …")
    command.add_argument("--json", action="store_true", help="one JSON object")
    command = add("report", report, "Draw one run, or two beside each other, as one HTML file.")
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="that run or compare has kept")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    command.add_argument("--png", type=Path, metavar="DIR", help="each picture as a PNG, too")
    return top


def _add_setup(command: argparse.ArgumentParser) -> None:
    pace = command.add_mutually_exclusive_group()
    pace.add_argument(
        "--speed", type=_number(float, 1e-3, 1e6), default=1.0, metavar="X", help="times the recorded pace (1)"
    )
    pace.add_argument("--flat-out", action="store_true", help="every access as soon as the one before is done")
    command.add_argument("--on-demand", action="store_true", help="send nothing but what is touched")
    command.add_argument("--seed", type=_number(int, 0, (1 << 64) - 1), default=1, help="decides the memory's content")
    _add_ways(command, "")


def _add_ways(command: argparse.ArgumentParser, against: str) -> None:
    """What two ways can differ in."""
    other = " in the other way" if against else ""
    command.add_argument(
        f"--{against}set",
        dest="against_settings" if against else "settings",
        action="append",
        default=[],
        metavar="TABLE.KEY=VALUE",
        help=f"a setting of the daemon{other}",
    )
    command.add_argument(
        f"--{against}source",
        action="append",
        default=[],
        metavar="ARGUMENT",
        help=f"for gmemd-source{other}, as --{against}source=--lanes=4",
    )
    command.add_argument(
        f"--{against}network", metavar="CONDITIONS", help=f"what lies between the two{other}: docs/network.md"
    )
    command.add_argument(
        f"--{against}programs",
        type=Path,
        metavar="DIR",
        help=f"gmemd and gmemd-source of another build{other}: a virtual environment, or the folder that they are in",
    )


def main(arguments: list[str] | None = None) -> int:
    """The console script."""
    log.set_up()
    return cli.run(parser(), lambda options: options.main(options), arguments)


if __name__ == "__main__":
    sys.exit(main())
