"""Man pages, completion and help: made from the parsers and from docs/, so that nothing is missing from them."""

import argparse
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gmemd.config import HOMES
from gmemd.examples import EXAMPLES, EXIT_CODES
from gmemd_tools.manual import roff
from gmemd_tools.manual.__main__ import DOCS, main
from gmemd_tools.manual.pages import pages, parsers, subcommands

# A table's column may be narrower than a word in it.
HARMLESS = "can't break line"


def every_parser() -> Iterator[argparse.ArgumentParser]:
    for parser in parsers():
        yield parser
        yield from subcommands(parser)


@pytest.fixture(scope="module")
def usr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("usr")
    main(folder)
    return folder


def test_every_option_is_in_its_page() -> None:
    made = pages(DOCS)
    for parser in every_parser():
        page = made[f"{parser.prog.split()[0]}.1"]
        part = page.partition(f'.SS "{roff.escape(parser.prog)}"')[2] if " " in parser.prog else page
        for action in parser._actions:
            assert all(roff.escape(name) in part for name in action.option_strings), (parser.prog, action)


def test_every_key_of_the_configuration_is_in_its_page() -> None:
    page = pages(DOCS)["gmemd.toml.5"]
    assert [key for key in HOMES if f".TP\n\\fB{key}\\fR\n" not in page] == []


def test_every_option_says_what_it_does() -> None:
    silent = [(parser.prog, a.dest) for parser in every_parser() for a in parser._actions if not (a.help or a.choices)]
    obvious = {"seed", "output", "COMMAND", "migration"}
    assert [(prog, dest) for prog, dest in silent if dest not in obvious] == []


def test_man_finds_nothing_wrong(usr: Path, require_command: Callable[[str], str]) -> None:
    require_command("groff")
    found = sorted(usr.glob("share/man/man*/*"))
    assert len(found) == 5
    for page in found:
        command = [require_command("man"), "--warnings=w", "--local-file", "-Tutf8", "-Z", str(page)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        assert [line for line in run.stderr.splitlines() if HARMLESS not in line] == [], page


def test_examples_are_what_the_commands_take() -> None:
    known = {parser.prog: parser for parser in parsers()}
    assert set(EXAMPLES) <= {parser.prog for parser in every_parser()}
    for prog, examples in EXAMPLES.items():
        for line, _ in examples:
            command, *arguments = shlex.split(line)
            assert line.startswith(prog if " " in prog else command)
            known[command].parse_args(arguments)


def test_help_ends_with_examples_and_exit_codes() -> None:
    help_text = parsers()[1].format_help()
    assert "\nexamples:\n  gmemd-source host-b --migration first" in help_text
    assert help_text.endswith(EXIT_CODES + "\n")


def test_exit_codes_in_help_are_all() -> None:
    documented = re.findall(r"^\| (\d+) \|", (DOCS / "exit-codes.md").read_text(), re.MULTILINE)
    assert set(re.findall(r"\b\d+\b", EXIT_CODES)) == {"0", "1", *documented}


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["gmemd", "sta"], ["status"]),
        (["gmemd", "status", "--w"], ["--watch"]),
        (["gmemd-source", "--mig"], ["--migration"]),
    ],
)
def test_bash_completes(usr: Path, require_command: Callable[[str], str], typed: list[str], offered: list[str]) -> None:
    script = f"""
        source {usr}/share/bash-completion/completions/{typed[0]}
        function=$(complete -p {typed[0]} | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        COMP_WORDS=({" ".join(typed)}) COMP_CWORD={len(typed) - 1} COMP_LINE='{" ".join(typed)}'
        $function {typed[0]} {typed[-1]} ''
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    run = subprocess.run([require_command("bash"), "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == offered, run.stderr


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        (".so a `b-c` *d*", ".PP\n\\&.so a \\fBb\\-c\\fR \\fId\\fR\n"),
        ("# Title\n\n## Part\n", '.SH "Part"\n'),
        ("- one\n- two", '.IP "\\(bu" 2\none\n.IP "\\(bu" 2\ntwo\n'),
        ("    a'b\n    .c", ".PP\n.in +4\n.nf\na\\(aqb\n\\&.c\n.fi\n.in\n"),
        ("| k | |\n|---|---|\n| `x` | y\\z |\n", ".TP\n\\fBx\\fR\ny\\ez\n"),
    ],
)
def test_markdown_as_roff(markdown: str, expected: str) -> None:
    assert roff.page(markdown) == expected
