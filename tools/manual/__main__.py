"""Writes man pages and completion below a folder, laid out as /usr is."""

import argparse
from pathlib import Path

import shtab

from gmemd_tools.manual.pages import pages, parsers, subcommands

DOCS = Path(__file__).parents[2] / "docs"
COMPLETION = {
    "bash": "share/bash-completion/completions/{}",
    "zsh": "share/zsh/site-functions/_{}",
    "fish": "share/fish/vendor_completions.d/{}.fish",
}


def main(folder: Path) -> None:
    for name, text in pages(DOCS).items():
        _write(folder / f"share/man/man{name[-1]}/{name}", text)
    for parser in parsers():
        for shell, place in COMPLETION.items():
            if shell in shtab.SUPPORTED_SHELLS:
                _write(folder / place.format(parser.prog), completion(parser, shell))


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    for action in (action for one in (parser, *subcommands(parser)) for action in one._actions):
        if action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(parser, shell=shell)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if text.endswith("\n") else text + "\n")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", type=Path)
    main(arguments.parse_args().folder)
