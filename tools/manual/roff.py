"""Markdown as man pages have it (man(7), tbl(1))."""

import re
from collections.abc import Iterator, Sequence

from markdown_it import MarkdownIt
from markdown_it.token import Token

ESCAPES = str.maketrans({"\\": r"\e", "-": r"\-", "^": r"\(ha", "~": r"\(ti", "`": r"\(ga", "'": r"\(aq"})
FONTS = {"strong_open": r"\fB", "em_open": r"\fI", "strong_close": r"\fR", "em_close": r"\fR"}
NARROW = 14  # wider columns are wrapped
LINE = 68  # what the margins leave of a terminal's line
WIDE = 2  # tables with more columns stay tables; others become paragraphs with a tag


def escape(text: str) -> str:
    """Text as it is."""
    return text.translate(ESCAPES)


def line(text: str) -> str:
    """A line of its own, which is no request even if it looks like one."""
    return (r"\&" if text.startswith((".", "'")) else "") + text


def header(name: str, section: int, version: str) -> str:
    return f'\'\\" t\n.TH {name.upper()} {section} "" "gmemd {version}" gmemd\n.nh\n.ad l\n'


def section(title: str) -> str:
    return f'.SH "{escape(title)}"\n'


def paragraph(text: str) -> str:
    return f".PP\n{line(escape(text))}\n"


def tagged(tag: str, text: str) -> str:
    """`tag` and `text` with fonts and escapes already."""
    return f".TP\n{line(tag)}\n{line(text)}\n"


def literal(text: str) -> str:
    lines = "".join(line(escape(part)) + "\n" for part in text.rstrip("\n").split("\n"))
    return f".PP\n.in +4\n.nf\n{lines}.fi\n.in\n"


def page(markdown: str) -> str:
    """The body of a document; its title is left out, and its headings are sections."""
    return "".join(_blocks(_parse(markdown)))


def rows(markdown: str) -> list[list[str]]:
    """The rows of the first table, their cells in roff, without its heading."""
    tokens = _parse(markdown)
    start = next(at for at, token in enumerate(tokens) if token.type == "table_open")
    return _table(tokens, start)[0][1:]


def _parse(markdown: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(markdown)


def _blocks(tokens: Sequence[Token]) -> Iterator[str]:
    at = 0
    while at < len(tokens):
        token = tokens[at]
        if token.type == "heading_open":
            text = _inline(tokens[at + 1])
            yield {"h1": "", "h2": f'.SH "{text}"\n'}.get(token.tag, f'.SS "{text}"\n')
            at += 2
        elif token.type == "paragraph_open" and not token.hidden:
            yield f".PP\n{line(_inline(tokens[at + 1]))}\n"
            at += 2
        elif token.type == "inline":
            yield line(_inline(token)) + "\n"
        elif token.type == "list_item_open":
            yield '.IP "\\(bu" 2\n'
        elif token.type in ("fence", "code_block"):
            yield literal(token.content)
        elif token.type == "table_open":
            table, at = _table(tokens, at)
            yield _tagged_rows(table) if len(table[0]) <= WIDE else _tbl(table)
        at += 1


def _table(tokens: Sequence[Token], at: int) -> tuple[list[list[str]], int]:
    """Its rows, and where it ends."""
    found: list[list[str]] = []
    while tokens[at].type != "table_close":
        if tokens[at].type == "tr_open":
            found.append([])
        elif tokens[at].type == "inline":
            found[-1].append(_inline(tokens[at]))
        at += 1
    return found, at


def _tagged_rows(table: list[list[str]]) -> str:
    return "".join(tagged(row[0], row[1] if len(row) > 1 and row[1] else r"\&") for row in table[1:])


def _tbl(table: list[list[str]]) -> str:
    """Columns that hold sentences share what the others leave of a terminal, and are wrapped."""
    longest = [max(_width(row[column]) for row in table) for column in range(len(table[0]))]
    wrapped = [column for column, width in enumerate(longest) if width > NARROW]
    taken = sum(width for width in longest if width <= NARROW) + 3 * len(longest)
    words = (word for row in table for column in wrapped for word in row[column].split())
    share = max((LINE - taken) // max(len(wrapped), 1), max(map(_width, words), default=0))  # no word is cut
    formats = [f"lw({share}n)" if column in wrapped else "l" for column in range(len(longest))]
    lines = (
        "\t".join(f"T{{\n{line(cell)}\nT}}" if column in wrapped else cell for column, cell in enumerate(row))
        for row in table
    )
    head = "lb " * len(longest) + "\n"
    return ".TS\nallbox;\n" + head + " ".join(formats) + ".\n" + "\n".join(lines) + "\n.TE\n"


def _width(cell: str) -> int:
    """As it is shown."""
    return len(re.sub(r"\\f.|\\(?=\(..)|\\", "", cell).replace("(ha", "x").replace("(ti", "x"))


def _inline(token: Token) -> str:
    parts = []
    for child in token.children or []:
        if child.type == "text":
            parts.append(escape(child.content))
        elif child.type == "code_inline":
            parts.append(rf"\fB{escape(child.content)}\fR")
        elif child.type in ("softbreak", "hardbreak"):
            parts.append(" ")
        else:
            parts.append(FONTS.get(child.type, ""))
    return re.sub(r" +", " ", "".join(parts))
