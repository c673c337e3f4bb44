"""A killed run ends like an undisturbed one: three kills of `make survive`'s kind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from survive import STAGES, plan, survive


@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
def test_a_run_killed_in_three_stages_ends_bitwise_equal(tmp_path: Path) -> None:
    """One run, killed in phase 1, in phase 2 and while it was measured, then left alone."""
    wanted = ("phase 1", "phase 2", "evaluation")
    text = tmp_path / "text"
    text.mkdir()
    for number in range(20):  # prepared in no time, which pydocs is not
        lines = (f"Line {n} of {number} has {n * n % 97} words." for n in range(60))
        (text / f"{number}.txt").write_text("\n".join(lines), "utf-8")
    given = [f"corpus=text:{text}", "validation=0.2", "documents=null"]
    given += ["tokens={train: 4000, validation: 350}"]
    settings = tuple(part for one in given for part in ("--set", one))
    (trial,) = survive(tmp_path, [wanted], seed=0, fresh=False, settings=settings)
    assert tuple(trial.stages) == wanted
    assert trial.differing == []


def test_the_full_test_kills_in_every_stage() -> None:
    runs = plan(20, 0)
    assert len(runs) == 20
    assert {stage for run in runs for stage in run} == set(STAGES)
    assert any(len(run) > 1 for run in runs)
