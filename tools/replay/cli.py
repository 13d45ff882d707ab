"""`gmemd-replay`: the command line."""

import argparse
import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from gmemd import __version__, cli, log
from gmemd.errors import DataError, UsageError
from gmemd.native.memory import Region
from gmemd.trace import TraceWriter
from gmemd_tools.replay import patterns, result, summary
from gmemd_tools.replay.merge import merge as merge_traces
from gmemd_tools.replay.recording import load
from gmemd_tools.replay.run import Setup, replay

BASE_PAGE = 4096
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


def merge(options: argparse.Namespace) -> int:
    merge_traces(options.traces, options.output)
    return 0


def run(options: argparse.Namespace) -> int:
    setup = Setup(
        speed=None if options.flat_out else options.speed,
        on_demand=options.on_demand,
        seed=options.seed,
        settings=_settings(options.settings),
        source_arguments=options.source,
        programs=options.programs,
    )
    found = replay(load(options.traces), setup)
    print(json.dumps(found) if options.json else result.text(found))
    return 0 if found["ok"] else DataError.exit_code


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
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
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

    command = add("merge", merge, "Make one trace of several of one image, for gmemd-source --order.")
    command.add_argument("traces", **traces, help="of guests with the same regions")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="may be one of them")

    command = add("run", run, "Play a trace against a daemon and a source, and check every page.")
    command.add_argument("traces", **traces, help="one file, or those of a rotating trace, oldest first")
    pace = command.add_mutually_exclusive_group()
    pace.add_argument(
        "--speed", type=_number(float, 1e-3, 1e6), default=1.0, metavar="X", help="times the recorded pace (1)"
    )
    pace.add_argument("--flat-out", action="store_true", help="every access as soon as the one before is done")
    command.add_argument("--on-demand", action="store_true", help="send nothing but what is touched")
    command.add_argument("--seed", type=_number(int, 0, (1 << 64) - 1), default=1, help="decides the memory's content")
    command.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="TABLE.KEY=VALUE", help="a setting of the daemon"
    )
    command.add_argument(
        "--source", action="append", default=[], metavar="ARGUMENT", help="for gmemd-source, as --source=--lanes=4"
    )
    command.add_argument("--programs", type=Path, metavar="DIR", help="gmemd and gmemd-source of another build")
    command.add_argument("--json", action="store_true", help="one JSON object")
    return top


def main(arguments: list[str] | None = None) -> int:
    """The console script."""
    log.set_up()
    return cli.run(parser(), lambda options: options.main(options), arguments)


if __name__ == "__main__":
    sys.exit(main())
