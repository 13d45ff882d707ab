"""What is made of the files that a run leaves behind."""

from pathlib import Path

import pytest

from tools.lab import suite, table
from tools.lab.suite import Ran

XML = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_good" time="1.5">
 <properties><property name="ratio" value="0.7"/></properties></testcase>
<testcase classname="tests.test_a" name="test_bad[1]" time="2"><failure message="assert 1 == 2">…</failure></testcase>
<testcase classname="tests.test_a" name="test_left" time="0"><skipped message="no such kernel">…</skipped></testcase>
<testcase classname="tests.test_a" name="test_broken" time="0"><error message="at set-up">…</error></testcase>
</testsuite></testsuites>
"""


@pytest.fixture
def ran(tmp_path: Path) -> Ran:
    (tmp_path / "tests.xml").write_text(XML)
    (tmp_path / "log").write_text("what pytest said")
    return Ran("tests/test_a.py", 1, 12.0, tmp_path)


def test_each_test_has_its_outcome(ran: Ran) -> None:
    assert [(case.name, case.outcome, case.why) for case in ran.cases] == [
        ("tests.test_a::test_good", "passed", ""),
        ("tests.test_a::test_bad[1]", "failed", "assert 1 == 2"),
        ("tests.test_a::test_left", "skipped", "no such kernel"),
        ("tests.test_a::test_broken", "failed", "at set-up"),
    ]
    assert ran.cases[0].measured == {"ratio": 0.7}
    assert str(ran) == "   12 s  tests/test_a.py: 1 passed, 2 failed, 1 skipped, status 1"


def test_the_summary_says_what_failed_and_why_tests_were_skipped(ran: Ran) -> None:
    assert suite.summary([ran, ran]).splitlines()[-2:] == [
        "skipped, 2: no such kernel",
        "2 passed, 4 failed, 2 skipped",
    ]
    assert "what pytest said" in suite.summary([ran])


def test_a_kernel_that_stopped_leaves_no_results(tmp_path: Path) -> None:
    assert str(Ran("tests/test_a.py", 70, 3.0, tmp_path)) == "    3 s  tests/test_a.py: no tests, status 70"


def test_the_page_tells_what_does_not_pass_everywhere() -> None:
    def result(name: str, outcome: str) -> table.Result:
        tests = [{"name": f"test_{n}", "outcome": o, "why": "lacking"} for n, o in (("a", "passed"), ("b", outcome))]
        measured = {"ratio": 0.71} if outcome == "passed" else {}
        return {
            "name": name,
            "release": "7.2",
            "doctor": None,
            "tests": tests,
            "measured": measured,
            "broken": ["c.py"],
            "seconds": 9.0,
        }

    page = table.page([result("native", "skipped"), result("lab", "passed")])
    assert "| `test_b` | 1 skipped | 1 passed |" in page
    assert "`test_a`" not in page
    assert "1 passed, 1 skipped; c.py did not come to its end" in page
    assert "- lab: ratio 0.71" in page
