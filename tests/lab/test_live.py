"""The history: a row a step, thinned where there are many, and begun anew when training resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from contextlm.base.errors import RunError
from contextlm.base.progress import SilentProgress
from contextlm.lab.live import MOST_STEP_ROWS, EpochWatcher, History
from contextlm.training.phase_two_state import Epoch


def train(path: Path, epochs: int, steps: int, until: int | None = None) -> list[dict[str, object]]:
    """What a training that ends, or is killed after a step, leaves."""
    watcher = EpochWatcher(SilentProgress(), History(path))
    for number in range(1, epochs + 1):
        watcher.on_epoch_begin(number, epochs, steps)
        for step in range((number - 1) * steps + 1, number * steps + 1):
            watcher.on_step(step, 1 / step, 0.5, 8 * step)
            if step == until:
                return [json.loads(line) for line in path.read_text().splitlines()]
        watcher.on_epoch_end(
            Epoch(number, number * steps, 8 * number * steps, 2.0, 3.0, 0.25, 0.5, 9.0), True
        )
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_step_and_every_epoch_has_a_row(tmp_path: Path) -> None:
    rows = train(tmp_path / "new" / "history.jsonl", 2, 2)
    assert [(row.get("step"), row["epoch"]) for row in rows] == [
        *((1, 1), (2, 1), (None, 1)),
        *((3, 2), (4, 2), (None, 2)),
    ]
    step = {"phase": 2, "step": 2, "epoch": 1, "loss": 0.5, "learning_rate": 0.5, "tokens": 16}
    assert rows[1] == step
    assert rows[2]["tokens"] == 16


def test_many_steps_are_thinned_evenly_over_all_epochs(tmp_path: Path) -> None:
    rows = train(tmp_path / "history.jsonl", 3, MOST_STEP_ROWS)
    steps = [row["step"] for row in rows if "step" in row]
    assert steps == list(range(1, 3 * MOST_STEP_ROWS + 1, 3))
    assert len(steps) == MOST_STEP_ROWS


def test_a_resumed_training_leaves_what_an_undisturbed_one_does(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole.jsonl", 2, 3)
    path = tmp_path / "killed.jsonl"
    train(path, 2, 3, until=5)
    path.write_text(path.read_text() + '{"phase": 2, "st', "utf-8")
    assert train(path, 2, 3) == whole


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_row_that_cannot_be_written_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"history\.jsonl: .*No space left on device"):
        train(path, 1, 1)
