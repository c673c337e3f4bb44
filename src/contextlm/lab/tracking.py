"""Trackers: a job's loss, validation, phase 1 and configuration for TensorBoard and its like.

They are accelerate's. Each job is a run of the tracker, in a project that has the run folder's
name. Nothing leaves the machine unless the tracker's own settings say so (``WANDB_MODE=online``,
``MLFLOW_TRACKING_URI``).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import (
    GeneralTracker,
    MLflowTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
)

from contextlm.base import distribution
from contextlm.base.errors import InputError, unknown_name
from contextlm.results.result import HistoryRow, PhaseOneRow, StepRow

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
_FOLDER = "_tracking"  # of a run; no contender can be named so


def check_trackers(names: Sequence[str]) -> None:
    """See to it that trackers are known and installed.

    Raises:
        InputError: one is not; the message names it.
    """
    for name in names:
        if name not in TRACKERS:
            raise unknown_name("tracker", name, TRACKERS)
        if find_spec(name) is None:
            raise InputError(
                f"--track {name}: the package {name} is not installed: pip install {name} "
                "(the extra trackers has tensorboard and trackio)"
            )


class Tracking:
    """The trackers of one job; takes the rows of its history."""

    def __init__(self, trackers: Sequence[GeneralTracker] = ()):
        self.trackers = list(trackers)

    def log(self, row: HistoryRow, step: int) -> None:
        """Pass a row on.

        Args:
            row: of the history.
            step: the iteration of phase 1, or the optimiser step that an epoch ends with.
        """
        if isinstance(row, PhaseOneRow):
            values = {"phase1/iteration": step, "phase1/converged": row.converged}
            if row.loss is not None:
                values["phase1/loss"] = row.loss
        elif isinstance(row, StepRow):
            values = {"train/step": step, "train/loss": row.loss, "train/tokens": row.tokens or 0}
            values["train/learning_rate"] = row.learning_rate
        else:
            values = {
                "train/step": step,
                "validation/loss": row.validation_loss,
                "validation/ppl": row.validation_ppl,
                "validation/accuracy": row.accuracy,
            }
        for tracker in list(self.trackers):
            # wandb drops steps lower than earlier ones, and phase 2 begins to count anew.
            with self.spared(tracker):
                tracker.log(values, step=None if tracker.name == "wandb" else step)

    @contextmanager
    def spared(self, tracker: GeneralTracker) -> Iterator[None]:
        """A tracker that fails is told on stderr and gets nothing more: training goes on."""
        try:
            yield
        except Exception as error:
            told = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"--track {tracker.name}: failed and is left out: {told}", file=sys.stderr)
            self.trackers.remove(tracker)


@contextmanager
def tracking(
    names: Sequence[str], run: Path, title: str, configuration: Mapping[str, Any]
) -> Iterator[Tracking]:
    """The trackers of these names for one job, begun with its configuration and ended.

    Of several processes the first alone has any.

    Args:
        names: of the trackers.
        run: the run folder.
        title: the job's name among those of the run.
        configuration: JSON values.
    """
    if not names or not distribution.is_main():
        yield Tracking()
        return
    place = (run / _FOLDER).absolute()
    place.mkdir(exist_ok=True)
    trackers = [_tracker(name, run.absolute().name, title, place) for name in names]
    told = Tracking(trackers)
    for tracker in trackers:
        with redirect_stdout(sys.stderr), told.spared(tracker):  # stdout is for the table
            tracker.start()
            tracker.store_init_configuration(dict(_flat(configuration)))
    try:
        yield told
    finally:
        for tracker in list(told.trackers):
            with redirect_stdout(sys.stderr), told.spared(tracker):
                tracker.finish()


def _tracker(name: str, project: str, title: str, place: Path) -> GeneralTracker:
    if name == "tensorboard":
        return TensorBoardTracker(title, place)
    if name == "wandb":
        mode = os.environ.get("WANDB_MODE", "offline")
        return WandBTracker(project, name=title, dir=str(place), mode=mode)
    if name == "trackio":
        return TrackioTracker(project, name=title)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'mlflow.db'}")
    return MLflowTracker(project, str(place / "mlflow"), run_name=title)


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str | int | float]]:
    """By dotted keys, in the types that all trackers take."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            plain = isinstance(value, (str, int, float))
            yield f"{above}{key}", value if plain else json.dumps(value)
