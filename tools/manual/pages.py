"""The man pages: commands from their parsers, files and protocols from their documents."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from gmemd import __version__, cli, examples, source_cli
from gmemd_tools.manual import roff
from gmemd_tools.replay import cli as replay_cli

DOCUMENTS = {
    ("gmemd.toml", 5): ("config.md", "configuration of the pager of migrating guests"),
    ("gmemd-protocol", 7): ("protocol.md", "protocol between a source and a destination"),
}
SEE_ALSO = [("gmemd", 1), ("gmemd-source", 1), ("gmemd-replay", 1), ("gmemd.toml", 5), ("gmemd-protocol", 7)]


def parsers() -> list[argparse.ArgumentParser]:
    """Those of all commands that are installed."""
    return [cli.parser(), source_cli.parser(), replay_cli.parser()]


def pages(docs: Path) -> dict[str, str]:
    """All of them, by the names of their files."""
    made = {f"{parser.prog}.1": command(parser, (docs / "exit-codes.md").read_text()) for parser in parsers()}
    for (name, number), (document, what) in DOCUMENTS.items():
        text = roff.header(name, number, __version__) + _name(name, what)
        text += roff.section("DESCRIPTION") + roff.page((docs / document).read_text())
        made[f"{name}.{number}"] = text + _see_also(name)
    return made


def command(parser: argparse.ArgumentParser, exit_codes: str) -> str:
    """One page for a command and its subcommands."""
    what = (parser.description or "").partition(". ")[0].removesuffix(".")
    every = [parser, *subcommands(parser)]
    parts = [
        roff.header(parser.prog, 1, __version__),
        _name(parser.prog, what[0].lower() + what[1:]),
        roff.section("SYNOPSIS"),
        *(_usage(one) for one in every[1:] or every),
        roff.section("DESCRIPTION"),
        roff.paragraph(parser.description or ""),
        roff.section("OPTIONS"),
        *_options(parser),
    ]
    if len(every) > 1:
        parts.append(roff.section("COMMANDS"))
    for one in every[1:]:
        parts += [f'.SS "{roff.escape(one.prog)}"\n', roff.paragraph(one.description or ""), *_options(one)]
    parts.append(roff.section("EXAMPLES"))
    for one in every:
        for line, why in examples.EXAMPLES.get(one.prog, []):
            parts.append(roff.paragraph(why[0].upper() + why[1:] + ":") + roff.literal(line))
    parts.append(roff.section("EXIT STATUS"))
    parts.append(roff.tagged("0", "success"))
    parts += [roff.tagged(row[0], row[2]) for row in roff.rows(exit_codes)]
    return "".join(parts) + _see_also(parser.prog)


def subcommands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def _name(name: str, what: str) -> str:
    return roff.section("NAME") + f"{roff.escape(name)} \\- {roff.escape(what)}\n"


def _usage(parser: argparse.ArgumentParser) -> str:
    usage = re.sub(r"\s+", " ", parser.format_usage().removeprefix("usage: ")).strip()
    rest = roff.escape(usage.removeprefix(parser.prog).strip())
    return f".PP\n\\fB{roff.escape(parser.prog)}\\fR {rest}\n"


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    formatter = parser._get_formatter()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) or action.help == argparse.SUPPRESS:
            continue
        text = formatter._expand_help(action) if action.help else ""
        yield roff.tagged(_tag(action), roff.escape(text) or r"\&")


def _tag(action: argparse.Action) -> str:
    """`--rate BYTES/S`, or what stands for a positional argument."""
    value = ""
    if action.nargs != 0:
        choices = "|".join(map(str, action.choices)) if action.choices is not None else ""
        value = str(action.metavar or choices or action.dest.upper())
    if not action.option_strings:
        return rf"\fI{roff.escape(value)}\fR"
    names = ", ".join(rf"\fB{roff.escape(name)}\fR" for name in action.option_strings)
    return rf"{names} \fI{roff.escape(value)}\fR" if value else names


def _see_also(name: str) -> str:
    others = (rf"\fB{roff.escape(other)}\fR({number})" for other, number in SEE_ALSO if other != name)
    return roff.section("SEE ALSO") + ", ".join(others) + "\n"
