"""`gmemd doctor`: what this host can do, what is missing, and how to mend it. A table for people, JSON for programs."""

import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gmemd.probe import BACKINGS, CHECKS, Ability, Check, Finding, Memory, ability
from gmemd.probe_apart import survey
from gmemd.show import show

Findings = Mapping[str, Finding]
Abilities = Mapping[str, Ability]

# A migration works here if it does on one of these. hugetlb alone does not count: its pool may be gone tomorrow.
ENOUGH = ("memfd", "guest_memfd", "guest_memfd_userfault")
WORKED = Finding(True).why
MEBIBYTE = 1 << 20


def main(json_output: bool) -> int:
    """Tries everything and prints it. The exit code: 0 if guests can be received here, else EX_UNAVAILABLE."""
    found = survey(CHECKS.values())
    abilities = {name: ability(name, found.__getitem__) for name in BACKINGS}
    works = any(abilities[name].ok for name in ENOUGH)
    if json_output:
        print(json.dumps(_as_json(found, abilities, works)))
    else:
        show(_report(found, abilities, works))
    return os.EX_OK if works else os.EX_UNAVAILABLE


def _as_json(found: Findings, abilities: Abilities, works: bool) -> dict[str, object]:
    return {
        "ok": works,
        "kernel": {"release": platform.release(), "machine": platform.machine()},
        "user": os.geteuid(),
        "checks": [
            {"name": name, "topic": check.topic, **asdict(found[name]), "means": check.means, "mend": check.mend}
            for name, check in CHECKS.items()
        ],
        "backings": {name: asdict(each) for name, each in abilities.items()},
    }


def _report(found: Findings, abilities: Abilities, works: bool) -> Group:
    verdict = "can" if works else "cannot"
    host = f"Linux {platform.release()}, {platform.machine()}, user id {os.geteuid()}"
    parts: list[RenderableType] = [f"Guests {verdict} be received here: {host}."]
    for part in (_summary(abilities), _obstacles(abilities), _memory(found), _topics(found), _missing(found)):
        parts += ["", part]
    return Group(*parts)


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for place, heading in enumerate(headings):
        table.add_column(heading, no_wrap=place == 0)
    return table


def _answer(ok: bool | None, *, matters: bool = True) -> Text:
    if ok is None:
        return Text("?", "yellow")
    return Text("yes", "green") if ok else Text("no", "red" if matters else "")


def _summary(abilities: Abilities) -> Table:
    table = _table("guest memory in", "migrates", "trap", "populate")
    for name, each in abilities.items():
        table.add_row(name, _answer(each.ok), each.trap or "-", ", ".join(each.populate) or "-")
    return table


def _titled(title: Text, rows: Iterable[tuple[str, Text]]) -> Group:
    """Names and what is said of them, below a line of their own."""
    table = _table("", "")
    table.show_header = False
    for name, text in rows:
        table.add_row(name, text)
    return Group(title, Padding(table, (0, 0, 0, 2)))


def _obstacles(abilities: Abilities) -> Group:
    rows = [(name, Text(each.why)) for name, each in abilities.items() if not each.ok]
    return _titled(Text("what stands in the way" if rows else "nothing stands in the way", "bold"), rows)


def _value(finding: Finding) -> str:
    """The value for people."""
    if isinstance(finding.value, list):
        return " ".join(finding.value)
    if isinstance(finding.value, int) and finding.value >= MEBIBYTE:
        return f"{finding.value // MEBIBYTE} MiB"
    return "" if finding.value is None else str(finding.value)


def _seen(finding: Finding) -> Text:
    parts = (_value(finding), "" if finding.why == WORKED else finding.why)
    return Text(", ".join(filter(None, parts)))


def _cell(check: Check, finding: Finding) -> Text:
    answer = _answer(finding.ok, matters=bool(check.mend))
    value = _value(finding)
    return Text.assemble(answer, (f" ({value})", "dim")) if value else answer


def _memory(found: Findings) -> Table:
    """One row a question, one column a kind of memory."""
    table = _table("memory", *(memory.replace("_no_direct_map", " no_direct_map") for memory in Memory))
    first = f"{Memory.MEMFD}."
    for what in (name.removeprefix(first) for name in CHECKS if name.startswith(first)):
        names = [f"{memory}.{what}" for memory in Memory]
        table.add_row(what, *(_cell(CHECKS[name], found[name]) for name in names))
    return table


def _topics(found: Findings) -> Table:
    table = _table("check", "", "seen")
    for check in (check for check in CHECKS.values() if check.topic not in set(Memory)):
        finding = found[check.name]
        table.add_row(check.name, _answer(finding.ok, matters=bool(check.mend)), _seen(finding))
    return table


def _missing(found: Findings) -> Group:
    """Every "no": those that are mended in the same way together, and last those where there is nothing to mend."""
    by_mend: dict[str, list[tuple[str, Text]]] = {}
    for check in sorted(CHECKS.values(), key=lambda check: not check.mend):
        finding = found[check.name]
        if finding.ok is False:
            text = Text.assemble(check.means, (f" [{finding.why}]", "dim"))
            by_mend.setdefault(check.mend, []).append((check.name, text))
    titles = {mend: Text.assemble(("to mend: ", "bold"), mend) for mend in by_mend}
    titles[""] = Text("nothing to mend, but to be known", "bold")
    return Group(*(_titled(titles[mend], rows) for mend, rows in by_mend.items()))
