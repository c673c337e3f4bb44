"""A comparison, from a checked recipe to a run folder with its report."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from contextlm import distribution
from contextlm.contender import run_contender
from contextlm.contexts import STORES
from contextlm.device import resolve_device
from contextlm.embeddings import learn_embedding
from contextlm.environment import describe_environment
from contextlm.errors import InputError
from contextlm.evaluation.result import read_run, seed_folder
from contextlm.files import write_json, write_text
from contextlm.preparation import Prepared, prepare
from contextlm.processes import check_recipe, check_same_data, shared_folder
from contextlm.progress import Progress, SilentProgress
from contextlm.recipe import Recipe, dump_recipe
from contextlm.report.page import write_report


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
    where = resolve_device(device)
    if where.index:
        # The Trainer takes the first visible device; a model elsewhere would be trained on another.
        raise InputError(
            f"--device {device}: choose the accelerator from outside, with "
            f"CUDA_VISIBLE_DEVICES={where.index} and --device {where.type}"
        )
    with distribution.joined(where) as own:
        return _run(recipe, out, own, progress if distribution.is_main() else SilentProgress())


def _run(recipe: Recipe, out: Path, where: torch.device, progress: Progress) -> Path:
    check_recipe(recipe, where)
    progress.update(f"preparing corpus {recipe.corpus}")
    prepared = distribution.main_first(lambda: prepare(recipe))
    check_same_data(prepared)
    folder = shared_folder(lambda: _begin(recipe, out, where))
    with _noting(folder):
        prepared = with_learned_embedding(recipe, prepared, folder, where, progress)
        for seed in recipe.seeds:
            with _stores(recipe, folder):
                for contender in recipe.contenders:
                    place = seed_folder(folder, contender.name, seed)
                    run_contender(recipe, contender, seed, prepared, place, where, progress)
        if distribution.is_main():
            write_report([read_run(folder)], folder)
    return folder


def run_one(
    recipe: Recipe, contender: str, seed: int, folder: Path, *, device: str, progress: Progress
) -> Path:
    """Train and measure one contender with one seed, as `run` would among all others.

    Args:
        recipe: with all contenders, which decide the text together.
        contender: the one to train.
        seed: the only one.
        folder: for this alone; it is laid out like a run's.
        device: ``auto``, ``cpu``, ``cuda``.
        progress: is told what happens.

    Returns:
        The contender and seed's own folder in it.

    Raises:
        InputError: the recipe or the device is not usable.
        RunError: a fault while running.
    """
    where = resolve_device(device)
    prepared = prepare(recipe)
    write_text(folder / "recipe.yaml", dump_recipe(recipe))
    write_json(folder / "environment.json", describe_environment(where, recipe.seeds))
    prepared = with_learned_embedding(recipe, prepared, folder, where, progress)
    (chosen,) = (entry for entry in recipe.contenders if entry.name == contender)
    place = seed_folder(folder, contender, seed)
    with _stores(recipe, folder):
        run_contender(recipe, chosen, seed, prepared, place, where, progress)
    return place


def _begin(recipe: Recipe, out: Path, device: torch.device) -> Path:
    """A new run folder with what is known before anything is trained."""
    folder = _new_folder(out, recipe.name)
    with _noting(folder):
        write_text(folder / "recipe.yaml", dump_recipe(recipe))
        write_json(folder / "environment.json", describe_environment(device, recipe.seeds))
    return folder


def with_learned_embedding(
    recipe: Recipe, prepared: Prepared, folder: Path, device: torch.device, progress: Progress
) -> Prepared:
    """`prepared`, with embeddings learned from the recipe's text if it asks for that.

    One table serves all contenders and seeds, as a pretrained one would.
    """
    if prepared.learning_text is None:
        return prepared
    learned = learn_embedding(
        recipe.embedding, prepared.learning_text, device, folder / "embedding", progress
    )
    return replace(prepared, embedding=learned)


@contextmanager
def _stores(recipe: Recipe, folder: Path) -> Iterator[None]:
    """Remove a seed's context stores at the end, however it comes, unless they are to be kept.

    They are large. Contenders share them where their blocks are the same, never between seeds.
    """
    try:
        yield
    finally:
        kept = recipe.context_store is not None and recipe.context_store.keep
        if distribution.is_main() and not kept:
            shutil.rmtree(folder / STORES, ignore_errors=True)


@contextmanager
def _noting(folder: Path) -> Iterator[None]:
    """Note on whatever ends the run, an interrupt too, where that which had finished is."""
    try:
        yield
    except BaseException as error:  # passed on as it is, with the note
        finished = any(folder.glob("*/*/result.json"))
        error.add_note(
            f"what finished is in {folder}" if finished else f"nothing had finished in {folder}"
        )
        raise


def _new_folder(out: Path, name: str) -> Path:
    """Make the next free ``name-001``; `mkdir` decides when two runs start at once."""
    out.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = out / f"{name}-{number:03d}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
