"""The page of a run that is still at work: its report so far, and the loss of every job by step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from contextlm.report import charts
from contextlm.report.language import say
from contextlm.report.page import render_page
from contextlm.results.result import read_run
from contextlm.results.run_files import read_text


def live_page(folder: Path, runs: Sequence[Path]) -> str:
    """The page, as HTML.

    Args:
        folder: that links are relative to.
        runs: one run folder, or those of a grid.

    Raises:
        InputError: a run folder is damaged.
    """
    jobs = [(run, job.parent) for run in runs for job in sorted(run.glob("*/**/seed-*/job.json"))]
    done = [place for _, place in jobs if (place / "result.json").is_file()]
    # Trials of learning rates come before the job that waits for them.
    trials = [(run, file.parent) for run in runs for file in run.glob("*/tuning/*/history.jsonl")]
    places = [*sorted(trials), *jobs]
    losses = [
        {"label": str(place.relative_to(folder)), **step}
        for run, place in places
        for step in _steps(run, place)
    ]
    drawn = charts.figure("live", charts.live_chart(pd.DataFrame(losses)))
    begun = [place for _, place in places if (place / "history.jsonl").is_file()]
    at_work = [
        str(place.relative_to(folder)) for place in begun if not (place / "result.json").is_file()
    ]
    said = say(
        "Contender {number} of {all}: {name}",
        number=min(len(done) + 1, len(jobs)),
        all=len(jobs),
        name=", ".join(at_work),
    )
    live = {"said": said, "done": len(done), "all": len(jobs), "figures": drawn}
    return render_page([read_run(run) for run in runs], folder, live=live)


def _steps(run: Path, place: Path) -> Iterator[dict[str, Any]]:
    """The steps that a job has written down so far; its last line may be half written."""
    file = place / "history.jsonl"
    if not file.is_file():
        return
    for line in read_text(run, file).splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "step" in row and "loss" in row:
            yield {"x": row["step"], "y": row["loss"]}
