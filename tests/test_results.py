"""The tables in docs/results.md are those of the runs kept beside it, to the character."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from contextlm.report.page import render_summary
from contextlm.results.result import read_run

DOCS = Path(__file__).parents[1] / "docs"
RUNS = sorted(path.parent for path in (DOCS / "measured").glob("*/recipe.yaml"))


def block(name: str) -> str:
    """What stands between the marks of `name`."""
    marks = rf"<!-- results:begin {name} -->\n(.*?)\n?<!-- results:end {name} -->"
    (found,) = re.findall(marks, (DOCS / "results.md").read_text("utf-8"), re.DOTALL)
    return found.strip()


def test_there_are_runs() -> None:
    assert RUNS


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_tables_come_from_the_runs(run: Path) -> None:
    assert block(run.name) == render_summary([read_run(run)]).strip()


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_run_names_no_place_of_the_machine_that_made_it(run: Path) -> None:
    for file in run.rglob("*"):
        if file.is_file():
            assert not re.search(r"(?<![\w.])/(work|tmp|home|root|mnt)\b", file.read_text("utf-8"))
