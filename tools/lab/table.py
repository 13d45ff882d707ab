"""docs/kernels.md from what the matrix found.

usage: python3 -m tools.lab.table RESULT.json... >docs/kernels.md
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tools.lab.suite import tally

Result = dict[str, Any]  # as tools/lab/matrix.py writes it

ORDER = ("native", "lab", "debian-bookworm", "debian-sid")
WHAT = {
    "native": "what the developers' machines run, on their CPU",
    "lab": "`make lab-kernel`, with the proposed patches; emulated",
    "debian-bookworm": "Debian 12's own; emulated",
    "debian-sid": "the newest that Debian has; emulated",
}
# What is asked of the host and not of its kernel.
HOST_TOPICS = ("limits", "systemd", "sandbox", "cpu")

HEAD = """# Kernels

Made by `make lab-matrix` from runs of `gmemd doctor` and of the tests under each kernel: do not edit.
"?" is what could not be tried, for want of something else.
"""


def rows(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    table = [headings, ["---"] * len(headings), *lines]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in table)


def names(results: Sequence[Result]) -> list[str]:
    return [result["name"] for result in results]


def kernels(results: Sequence[Result]) -> str:
    def line(result: Result) -> list[str]:
        ran = tally(test["outcome"] for test in result["tests"])
        ran += "".join(f"; {file} did not come to its end" for file in result["broken"])
        return [result["name"], result["release"] or "?", WHAT[result["name"]], ran, f"{result['seconds']:.0f} s"]

    return rows(("kernel", "release", "", "tests", "in"), map(line, results))


def backings(results: Sequence[Result]) -> str:
    """What a migration would do: one row a kind of guest memory."""

    def cell(found: Result) -> str:
        if found["ok"]:
            return f"{found['trap']}; {', '.join(found['populate'])}"
        return "no" if found["ok"] is False else "?"

    found = [result["doctor"]["backings"] for result in results]
    lines = [[name, *(cell(backings[name]) for backings in found)] for name in found[0]]
    return rows(("guest memory in", *names(results)), lines)


def answer(check: Result) -> str:
    word = {True: "yes", False: "no", None: "?"}[check["ok"]]
    value = check["value"]
    return f"{word} ({value})" if isinstance(value, str) else word


def checks(results: Sequence[Result]) -> str:
    """The doctor's findings: those that differ as a table, the others as a list."""
    found = [{check["name"]: check for check in result["doctor"]["checks"]} for result in results]
    asked = [name for name, check in found[0].items() if check["topic"] not in HOST_TOPICS]
    answers = {name: [answer(by_name[name]) for by_name in found] for name in asked}
    differ = [[name, *words] for name, words in answers.items() if len(set(words)) > 1]
    table = rows(("check", *names(results)), differ)
    same: dict[str, list[str]] = {}
    for name, words in answers.items():
        if len(set(words)) == 1:
            same.setdefault(words[0], []).append(f"`{name}`")
    lists = [f"- {word}: {', '.join(alike)}\n" for word, alike in same.items()]
    return "\n".join((table, "The same under each:\n", "".join(lists)))


def tests(results: Sequence[Result]) -> str:
    """The tests that do not pass under each kernel, by function; and why those failed that did."""
    found: dict[str, dict[str, list[str]]] = {}
    for result in results:
        for test in result["tests"]:
            function = test["name"].split("[")[0]
            found.setdefault(function, {}).setdefault(result["name"], []).append(test["outcome"])
    lines = [
        [f"`{function}`", *(tally(by_kernel.get(name, ())) for name in names(results))]
        for function, by_kernel in found.items()
        if any(outcome != "passed" for outcomes in by_kernel.values() for outcome in outcomes)
    ]
    failed = [
        f"- {result['name']}, `{test['name']}`: {test['why'].splitlines()[0] if test['why'] else 'no reason given'}\n"
        for result in results
        for test in result["tests"]
        if test["outcome"] == "failed"
    ]
    return "\n".join(filter(None, (rows(("test", *names(results)), lines), "".join(failed))))


def measured(results: Sequence[Result]) -> str:
    lines = [
        f"- {result['name']}: {', '.join(f'{name} {value:g}' for name, value in result['measured'].items())}\n"
        for result in results
        if result["measured"]
    ]
    return "".join(lines) or "Nothing.\n"


def page(results: Sequence[Result]) -> str:
    seen = [result for result in results if result["doctor"]]
    parts = [HEAD, kernels(results)]
    if seen:
        parts += ["## How guests can be received (trap; ways to populate)\n", backings(seen)]
        parts += ["## What the kernel can do\n", checks(seen)]
    parts += ["## Tests that do not pass everywhere\n", tests(results)]
    parts += ["## Measured by these tests\n", measured(results)]
    return "\n".join(parts)


def main(paths: Sequence[str]) -> None:
    results = [json.loads(Path(path).read_text()) for path in paths]
    print(page(sorted(results, key=lambda result: ORDER.index(result["name"]))), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
