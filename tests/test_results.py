"""The pages in results/ are those that results/make.py makes of its files, to the character."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from contextlm.report import numbers

RESULTS = Path(__file__).parents[1] / "results"
PAGES = sorted(RESULTS.glob("*.md"))
_spec = importlib.util.spec_from_file_location("make", RESULTS / "make.py")
assert _spec is not None
assert _spec.loader is not None
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)


@pytest.fixture
def runs() -> pd.DataFrame:
    return pd.read_csv(RESULTS / "runs.csv", dtype_backend="numpy_nullable")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for page in RESULTS.parent.glob("README*.md"):
        shutil.copy(page, tmp_path)
    return Path(shutil.copytree(RESULTS, tmp_path / "results"))


def test_making_changes_nothing(copy: Path) -> None:
    shutil.rmtree(copy / "plots")
    make.make(copy)
    made = [path for path in RESULTS.rglob("*") if path.suffix in {".md", ".svg"}]
    for file in (*made, *RESULTS.parent.glob("README*.md")):
        other = copy.parent / file.relative_to(RESULTS.parent)
        assert other.read_bytes() == file.read_bytes(), file.name


def test_a_changed_figure_is_made_again(copy: Path) -> None:
    page = copy / "frontier.md"
    right = page.read_text("utf-8")
    wrong = right.replace("-->95.6 ± 8.0<!--", "-->95.7<!--").replace("| mha (baseline)", "| mha")
    assert wrong != right
    page.write_text(wrong, "utf-8")
    make.make(copy)
    assert page.read_text("utf-8") == right


def test_a_changed_row_shows(copy: Path) -> None:
    runs = pd.read_csv(copy / "runs.csv")
    runs.loc[runs.contender == "hybrid", "validation_ppl"] += 1
    runs.to_csv(copy / "runs.csv", index=False)
    make.make(copy)
    for name in ("frontier.md", "plots/frontier.svg", "plots/budgets.svg"):
        assert (copy / name).read_bytes() != (RESULTS / name).read_bytes()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_table_and_plot_is_made(page: Path) -> None:
    text = page.read_text("utf-8")
    assert "<!-- make" not in make.MARKS.sub("", text), "a mark that is never closed"
    assert not re.search(r"^\|", make.MARKS.sub("", text), re.MULTILINE)
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (RESULTS / target).exists(), target


def test_no_row_stands_twice(runs: pd.DataFrame) -> None:
    assert not runs.duplicated(["run", "contender", "seed", "budget"]).any()
    assert not runs.duplicated([name for name in runs if name not in make.NOT_FIGURES]).any()


def test_a_run_that_serves_two_questions_is_one_row(runs: pd.DataFrame) -> None:
    new = runs[runs.question == "books"].drop(columns=["question", "budget"])
    again = make.taken_in(runs, new.assign(run="elsewhere"), "second")
    assert len(again) == len(runs)
    assert set(again[again.run == "frontier-books"].question) == {"books second"}
    more = make.taken_in(runs, new.assign(seed=new.seed + 10), "books")
    assert len(more) == len(runs) + len(new)
    assert list(more.columns) == list(runs.columns)


def test_statistics_against_numbers_worked_out_by_hand(copy: Path) -> None:
    runs = pd.read_csv(copy / "runs.csv")
    for contender, losses in {"mha": (1.0, 1.2, 1.4), "hybrid": (0.9, 1.0, 1.4)}.items():
        these = (runs.run == "frontier-books") & (runs.contender == contender)
        runs.loc[these, "validation_loss"] = losses
        runs.loc[these, "validation_ppl"] = (10.0, 12.0, 14.0)
    runs.to_csv(copy / "runs.csv", index=False)
    results = make.Results(copy)
    assert results.value("ppl", "books", "mha") == "12.0 ± 2.0"
    assert results.value("change", "books", "hybrid") == "-9.5%"  # exp(-0.1)
    # Differences -0.1, -0.2, 0: -0.1 -+ 4.3027 (Student's t, two degrees) 0.1 / sqrt(3).
    assert results.value("interval", "books", "hybrid") == "-29.4% to +16.0%"
    assert results.value("interval", "half", "hybrid") == numbers.ABSENT  # one seed
