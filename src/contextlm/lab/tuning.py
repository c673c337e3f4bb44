"""A learning rate for each contender, found by one rule for all.

Each rate of the grid trains the contender on the first part of the windows; the lowest validation
loss wins. Where an end of the grid wins, the grid grows by a factor of two beyond it, so that the
rate that is taken lies between two worse ones, as far as `extensions` allows.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from contextlm.base import distribution
from contextlm.base.errors import NotFiniteError, RunError
from contextlm.base.files import write_json
from contextlm.base.progress import Progress
from contextlm.data.windows import Windows
from contextlm.lab.contender import try_contender
from contextlm.lab.preparation import Prepared
from contextlm.lab.run_folder import working_folder
from contextlm.recipe.schema import Contender, Recipe
from contextlm.recipe.settings import TuningSettings
from contextlm.results.facts import TuningFacts, TuningTrial

FOLDER = "tuning"  # beside the seeds of a contender


def with_rate(contender: Contender, rate: float) -> Contender:
    """The contender with a learning rate of its own."""
    training = {**contender.training, "learning_rate": rate}
    return contender.model_copy(update={"training": training})


def tune(
    recipe: Recipe,
    contender: Contender,
    prepared: Prepared,
    run: Path,
    device: torch.device,
    progress: Progress,
) -> TuningFacts | None:
    """The trials of a contender's learning rate; None if the recipe wants no tuning.

    Trials that an earlier call left in the run folder are not repeated.

    Args:
        recipe: the comparison.
        contender: which of its models.
        prepared: the recipe's data and configurations.
        run: the run folder.
        device: where to compute.
        progress: is told what happens.

    Raises:
        RunError: training broke down at every rate.
    """
    settings = recipe.tuning
    if settings is None:
        return None
    training = recipe.training_of(contender)
    fewest = training.batch_size if training.drop_last else 1
    part = _part(prepared, contender, settings.share, fewest)
    warmup = round(settings.share * training.warmup)
    shorter = contender.model_copy(update={"training": {**contender.training, "warmup": warmup}})
    trials: dict[float, TuningTrial] = {}

    def attempt(rate: float) -> None:
        place = run / contender.name / FOLDER / repr(rate)
        tried = with_rate(shorter, rate)
        trials[rate] = _trial(recipe, tried, settings, part, place, device, progress)

    for rate in settings.learning_rates:
        attempt(rate)
    for _ in range(settings.extensions):
        further = _beyond(trials)
        if further is None:
            break
        attempt(further)
    if all(trial.validation_loss is None for trial in trials.values()):
        raise RunError(f"{contender.name}: training broke down at every rate of tuning")
    ordered = [trials[rate] for rate in sorted(trials)]
    return TuningFacts(share=settings.share, seed=settings.seed, trials=ordered)


def _beyond(trials: dict[float, TuningTrial]) -> float | None:
    """The rate to try next: beyond the end of those tried that was best; None if no end was."""
    losses = {
        rate: t.validation_loss for rate, t in trials.items() if t.validation_loss is not None
    }
    if not losses:
        return None
    best = min(losses, key=losses.__getitem__)
    if best == max(trials):  # where the next one broke down, there is no use in going on
        return 2 * best
    return best / 2 if best == min(trials) else None


def _trial(
    recipe: Recipe,
    contender: Contender,
    settings: TuningSettings,
    part: Prepared,
    place: Path,
    device: torch.device,
    progress: Progress,
) -> TuningTrial:
    """What one rate gives; a trial without a loss is one at which training broke down."""
    done = place / "trial.json"
    rate = recipe.training_of(contender).learning_rate
    known = distribution.by_main(lambda: _known(done, rate))
    if known is not None:
        return known
    progress.stage(f"{contender.name}, trying learning rate {rate:g}")
    working = working_folder(place.parents[2], contender.name, f"{FOLDER}-{place.name}")
    loss = None
    try:
        loss = try_contender(
            recipe, contender, settings.seed, part, place, device, progress, working
        )
    except NotFiniteError as error:
        if distribution.world() > 1:
            raise  # a loss of one process's own: the others are still at it
        progress.line(f"given up: {error}")
    trial = TuningTrial(learning_rate=rate, validation_loss=loss)
    if distribution.is_main():
        write_json(done, trial.model_dump())
        shutil.rmtree(working, ignore_errors=True)
    return trial


def _known(done: Path, rate: float) -> TuningTrial | None:
    """A trial that an earlier call left; one that is damaged or of another rate is made again."""
    try:
        trial = TuningTrial.model_validate_json(done.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return trial if trial.learning_rate == rate else None


def _part(prepared: Prepared, contender: Contender, share: float, fewest: int) -> Prepared:
    """The data with the first part of the contender's training windows, but no fewer than given."""
    windows = prepared.train[contender.name]
    assert isinstance(windows, Windows)  # a recipe with tuning has no lines
    first = windows.first(min(len(windows), max(fewest, round(share * len(windows)))))
    return replace(prepared, train={contender.name: first}, stream=first.stream())
