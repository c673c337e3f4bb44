"""A comparison, from a checked recipe to a run folder with its report."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from contextlm.base import distribution
from contextlm.base.device import resolve_device
from contextlm.base.errors import InputError, NotFiniteError, is_out_of_memory
from contextlm.base.files import write_json, write_text
from contextlm.base.progress import Progress, SilentProgress
from contextlm.lab.contender import run_contender
from contextlm.lab.contexts import STORES
from contextlm.lab.embeddings import learn_embedding
from contextlm.lab.environment import describe_environment, note_changes
from contextlm.lab.preparation import Prepared, prepare
from contextlm.lab.processes import check_recipe, check_same_data, shared_folder
from contextlm.lab.run_folder import (
    check_data,
    data_fingerprint,
    finish,
    held_run,
    new_run,
    working_folder,
)
from contextlm.lab.tuning import tune, with_rate
from contextlm.recipe.loading import dump_recipe, load_recipe
from contextlm.recipe.schema import Contender, Recipe
from contextlm.report.page import write_report
from contextlm.results.facts import TuningFacts
from contextlm.results.result import read_outcome, read_run, seed_folder


def run(recipe: Recipe, out: Path, *, device: str, progress: Progress) -> Path:
    """Train and measure every contender with every seed, and write the report.

    Where a launcher (torchrun, accelerate) started several processes, all call this and share the
    work; the first alone writes and tells `progress`.

    Args:
        recipe: the comparison.
        out: where run folders go; this run gets a new numbered one.
        device: ``auto``, ``cpu``, ``cuda`` ...
        progress: is told what happens.

    Returns:
        The run folder.

    Raises:
        InputError: the recipe, its corpus or the device is not usable; nothing was written.
        RunError: a fault while running; what had finished stays.
    """
    with distribution.joined(_usable_device(device)) as where:
        if not distribution.is_main():
            progress = SilentProgress()
        check_recipe(recipe, where)
        progress.update(f"preparing corpus {recipe.corpus}")
        prepared = distribution.main_first(lambda: prepare(recipe))
        if repetition := prepared.facts.repetition():
            progress.line(repetition)
        check_same_data(prepared)
        environment = describe_environment(where, recipe.seeds)
        with ExitStack() as stack:  # of rank 0, which holds the folder for all

            def begin() -> Path:
                data = data_fingerprint(prepared)
                made = new_run(out, recipe.name, dump_recipe(recipe), environment, data)
                return stack.enter_context(made)

            folder = shared_folder(begin)
            _complete(recipe, prepared, folder, where, progress)
    return folder


def tune_one(
    recipe: Recipe, contender: str, folder: Path, *, device: str, progress: Progress
) -> TuningFacts | None:
    """Find the learning rate of one contender, as `run` would before it trains it.

    Args:
        recipe: with all contenders, which decide the text together.
        contender: the one to tune.
        folder: the run folder; the trials stay there and are not repeated.
        device: ``auto``, ``cpu``, ``cuda``.
        progress: is told what happens.

    Raises:
        InputError: the recipe or the device is not usable.
        RunError: training broke down at every rate, or another fault.
    """
    where = _usable_device(device)
    check_recipe(recipe, where)
    working = working_folder(folder, contender)
    try:
        prepared = prepare(recipe)
        prepared = with_learned_embedding(recipe, prepared, working, where, progress)
        return tune(recipe, recipe.contender(contender), prepared, folder, where, progress)
    finally:
        shutil.rmtree(working, ignore_errors=True)
        with suppress(OSError):  # others may be at work in there
            working.parent.rmdir()


def run_one(
    recipe: Recipe,
    contender: str,
    seed: int,
    folder: Path,
    *,
    device: str,
    progress: Progress,
    tuning: TuningFacts | None,
) -> Path:
    """Train and measure one contender with one seed, as `run` would among all others.

    Args:
        recipe: with all contenders, which decide the text together.
        contender: the one to train.
        seed: the only one.
        folder: for this alone; it is laid out like a run's.
        device: ``auto``, ``cpu``, ``cuda``.
        progress: is told what happens.
        tuning: what `tune_one` gave.

    Returns:
        The contender and seed's own folder in it.

    Raises:
        InputError: the recipe or the device is not usable.
        RunError: a fault while running.
    """
    where = _usable_device(device)
    check_recipe(recipe, where)
    prepared = prepare(recipe)
    write_text(folder / "recipe.yaml", dump_recipe(recipe))
    write_json(folder / "environment.json", describe_environment(where, recipe.seeds))
    prepared = with_learned_embedding(recipe, prepared, folder, where, progress)
    _run(recipe, recipe.contender(contender), seed, prepared, folder, where, progress, tuning)
    _drop_stores(recipe, folder)
    shutil.rmtree(working_folder(folder), ignore_errors=True)
    return seed_folder(folder, contender, seed)


def resume(folder: Path, *, device: str, progress: Progress) -> Path:
    """Go on with a run that was killed, interrupted or stopped by a fault, until it is finished.

    It ends as it would have without that, to the bit, on the same machine with the same versions.

    Args:
        folder: the run's.
        device: ``auto`` or the kind of device that it began on.
        progress: is told what happens.

    Returns:
        The run folder.

    Raises:
        InputError: no unfinished run is there, another process is at work on it, or the recipe, the
            data or the kind of device is not what it began with.
        RunError: a fault while running; what had finished stays.
    """
    if "LOCAL_RANK" in os.environ:
        raise InputError("--resume: a run is resumed by one process, not by several")
    where = _usable_device(device)
    with held_run(folder) as state:
        if str(state["device"]).partition(":")[0] != where.type:
            raise InputError(
                f"{folder}: began on {state['device']}, and is resumed there only: "
                f"name it with --device"
            )
        recipe = load_recipe(str(folder / "recipe.yaml"))
        check_recipe(recipe, where)
        progress.line(f"resuming {folder}")
        progress.update(f"preparing corpus {recipe.corpus}")
        prepared = prepare(recipe)
        check_data(folder, state, data_fingerprint(prepared))
        note_changes(
            folder / "environment.json", describe_environment(where, recipe.seeds), progress
        )
        _complete(recipe, prepared, folder, where, progress)
    return folder


def _usable_device(name: str) -> torch.device:
    where = resolve_device(name)
    if where.index:
        # The Trainer takes the first visible device; a model elsewhere would be trained on another.
        raise InputError(
            f"--device {name}: choose the accelerator from outside, with "
            f"CUDA_VISIBLE_DEVICES={where.index} and --device {where.type}"
        )
    return where


def _complete(
    recipe: Recipe, prepared: Prepared, folder: Path, where: torch.device, progress: Progress
) -> None:
    """Whatever of the run is not done yet, then the report."""
    with _noting(folder):
        prepared = with_learned_embedding(recipe, prepared, folder, where, progress)
        for seed in recipe.seeds:
            for contender in recipe.contenders:
                if not _has_finished(folder, contender.name, seed, progress):
                    tuning = tune(recipe, contender, prepared, folder, where, progress)
                    _run(recipe, contender, seed, prepared, folder, where, progress, tuning)
            _drop_stores(recipe, folder)
        if distribution.is_main():
            write_report([read_run(folder)], folder)
            finish(folder)


def _drop_stores(recipe: Recipe, folder: Path) -> None:
    """Remove a seed's context stores, unless they are to be kept.

    They are large. Contenders share them where their blocks are the same, never between seeds. A
    run that ends early keeps them to go on with.
    """
    kept = recipe.context_store is not None and recipe.context_store.keep
    if distribution.is_main() and not kept:
        shutil.rmtree(folder / STORES, ignore_errors=True)


def _run(
    recipe: Recipe,
    contender: Contender,
    seed: int,
    prepared: Prepared,
    folder: Path,
    where: torch.device,
    progress: Progress,
    tuning: TuningFacts | None,
) -> None:
    """One contender and seed, at the learning rate that tuning gave where the recipe asks."""
    tuned = contender if tuning is None else with_rate(contender, tuning.chosen)
    place = seed_folder(folder, contender.name, seed)
    working = working_folder(folder, contender.name, f"seed-{seed}")
    run_contender(recipe, tuned, seed, prepared, place, where, progress, working, tuning)


def _has_finished(run: Path, contender: str, seed: int, progress: Progress) -> bool:
    """Whether a contender and seed has its result; a damaged one is told and made again."""

    def look() -> bool:
        if not (seed_folder(run, contender, seed) / "result.json").exists():
            return False
        try:
            read_outcome(run, contender, seed)
        except InputError as error:
            progress.line(f"made again: {error}")
            return False
        return True

    return distribution.by_main(look)


def with_learned_embedding(
    recipe: Recipe, prepared: Prepared, folder: Path, device: torch.device, progress: Progress
) -> Prepared:
    """`prepared`, with embeddings learned from the recipe's text if it asks for that.

    One table serves all contenders and seeds, as a pretrained one would.
    """
    if prepared.learning_text is None:
        return prepared
    learned = learn_embedding(
        recipe.embedding,
        prepared.learning_text,
        device,
        working_folder(folder, "embedding"),
        progress,
    )
    return replace(prepared, embedding=learned)


@contextmanager
def _noting(folder: Path) -> Iterator[None]:
    """Note on whatever ends the run, an interrupt too, what there is and how to go on."""
    try:
        yield
    except BaseException as error:  # passed on as it is, with the notes
        finished = any(folder.glob("*/*/result.json"))
        error.add_note(
            f"what finished is in {folder}" if finished else f"nothing had finished in {folder}"
        )
        if is_out_of_memory(error):
            error.add_note(
                "a lower training.batch_size (and evaluation.batch_size), a higher "
                "training.accumulation or a lower sequence_length needs less"
            )
        if not isinstance(error, (InputError, NotFiniteError)):
            error.add_note(f"to go on: contextlm run --resume {shlex.quote(str(folder))}")
        raise
