"""Trackers: what a job tells them, offline, and the one line for one that is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.tracking import TensorBoardTracker

from contextlm.base.errors import InputError
from contextlm.base.progress import SilentProgress
from contextlm.cli import app
from contextlm.cli.shell import execute
from contextlm.lab import running
from contextlm.lab.run_folder import is_unfinished
from contextlm.lab.tracking import check_trackers
from contextlm.recipe.loading import load_recipe
from contextlm.results.result import PhaseOneRow, StepRow, read_run


def tracked(quick: str, out: Path, name: str) -> Path:
    recipe = load_recipe(quick)
    return running.run(recipe, out, device="cpu", progress=SilentProgress(), track=[name])


def rows_of(run: Path, kind: type) -> list:
    ours = read_run(run).outcomes[1]
    return [row for row in ours.history if isinstance(row, kind)]


def test_tensorboard_gets_the_history_and_the_configuration(quick, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tracked(quick, tmp_path, "tensorboard")
    assert not is_unfinished(run)
    place = run / "_tracking" / "ours" / "seed-0"
    events = EventAccumulator(str(place))
    events.Reload()
    steps = rows_of(run, StepRow)
    told = events.Scalars("train/loss")
    assert [event.step for event in told] == [row.step for row in steps] == [1, 2, 3]
    assert [event.value for event in told] == pytest.approx([row.loss for row in steps], rel=1e-6)
    assert [event.value for event in events.Scalars("train/tokens")] == [128, 256, 384]
    iterations = rows_of(run, PhaseOneRow)
    assert [event.step for event in events.Scalars("phase1/converged")] == [1, 2]
    (loss,) = events.Scalars("phase1/loss")
    assert loss.value == pytest.approx(iterations[1].loss, rel=1e-6)
    (validation,) = events.Scalars("validation/ppl")
    assert (validation.step, validation.value) == (3, pytest.approx(
        read_run(run).outcomes[1].result.validation_ppl, rel=1e-6
    ))  # fmt: skip
    (settings,) = place.glob("*/hparams.yml")
    text = settings.read_text()
    assert "model.context_dim: 8" in text
    assert "training.learning_rate: 0.0001" in text


def test_trackio_gets_the_same_in_the_database_of_this_machine(quick, tmp_path, monkeypatch):
    from trackio import utils
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr(utils, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    run = tracked(quick, tmp_path, "trackio")
    logs = SQLiteStorage.get_logs(run.name, "ours/seed-0")
    told = [row["train/loss"] for row in logs if "train/loss" in row]
    assert told == pytest.approx([row.loss for row in rows_of(run, StepRow)])


@pytest.mark.parametrize("fails", ["start", "log", "finish"])
def test_a_tracker_that_fails_costs_no_training(quick, tmp_path, monkeypatch, capsys, fails):
    def away(*_: object, **__: object) -> None:
        raise ConnectionError("the server is away\nand more")

    monkeypatch.setattr(TensorBoardTracker, fails, away)
    run = tracked(quick, tmp_path, "tensorboard")
    assert not is_unfinished(run)
    lines = [line for line in capsys.readouterr().err.splitlines() if "--track" in line]
    told = "--track tensorboard: failed and is left out: ConnectionError: the server is away"
    assert lines == [told] * 2  # one for each job


def test_a_tracker_that_is_not_there_is_one_line(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("contextlm.lab.tracking.find_spec", lambda name: None)
    code = execute(app, ["run", quick, "--out", str(tmp_path / "runs"), "--track", "wandb"])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.splitlines()[-1] == (
        "contextlm: error: --track wandb: the package wandb is not installed: pip install wandb "
        "(the extra trackers has tensorboard and trackio)"
    )
    assert not (tmp_path / "runs").exists()
    with pytest.raises(InputError, match=r"unknown tracker 'tensorbord' .*'tensorboard'"):
        check_trackers(["tensorbord"])
