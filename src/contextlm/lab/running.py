"""A comparison, from a checked recipe to a run folder with its report: begun, resumed or extended.

All three are the same: the jobs of a recipe are listed, and those without a result are done.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from contextlm.base import distribution
from contextlm.base.device import resolve_device
from contextlm.base.errors import InputError, NotFiniteError, is_out_of_memory
from contextlm.base.files import atomic_folder, write_json, write_text
from contextlm.base.progress import Progress, SilentProgress
from contextlm.lab.environment import describe_environment, note_changes
from contextlm.lab.executors import Here, RayWorkers, carry_out
from contextlm.lab.grid import Point
from contextlm.lab.jobs import Planner, check_job, write_job
from contextlm.lab.preparation import prepare
from contextlm.lab.processes import check_recipe, check_same_data, shared_folder
from contextlm.lab.run_folder import (
    POINTS,
    finish,
    held,
    is_unfinished,
    mark_unfinished,
    new_folder,
    points_of,
    write_run,
)
from contextlm.recipe.schema import Recipe, dump_recipe, load_recipe
from contextlm.report.grid import GridPoint, write_grid
from contextlm.report.page import write_report
from contextlm.results.result import read_run

Runs = list[tuple[Path, Planner]]


def run(
    recipe: Recipe, out: Path, *, device: str, progress: Progress, workers: int | None = None
) -> Path:
    """Train and measure every contender with every seed, and write the report.

    Where a launcher (torchrun, accelerate) started several processes, all call this and share each
    job; the first alone writes and tells `progress`.

    Args:
        recipe: the comparison.
        out: where run folders go; this run gets a new numbered one.
        device: ``auto``, ``cpu``, ``cuda`` ...
        progress: gets headings, epochs and what is at work.
        workers: do the jobs in so many workers of Ray instead of this process.

    Returns:
        The run folder.

    Raises:
        InputError: the recipe, its corpus or the device is not usable; nothing was written.
        RunError: a fault while running; what had finished stays.
    """
    with _processes(device, progress) as (own_device, progress):
        planner = _planner(recipe, own_device, progress)
        folder = shared_folder(lambda: new_folder(out, recipe.name, lambda at: _begin(at, planner)))
        with _held([folder]):
            _complete([(folder, planner)], progress, workers)
    return folder


def run_grid(
    points: Sequence[Point],
    out: Path,
    *,
    device: str,
    progress: Progress,
    workers: int | None = None,
) -> Path:
    """Run a recipe at every point of a grid, each in a run folder of its own.

    Args:
        points: their recipes.
        out: where the grid's new numbered folder goes.
        device, progress, workers: as for `run`.

    Returns:
        The grid's folder, with the points' folders and a report of all.

    Raises:
        InputError, RunError: as for `run`.
    """
    with _processes(device, progress) as (own_device, progress):
        planners = {p.name: _planner(p.recipe, own_device, progress) for p in points}

        def fill(at: Path) -> None:
            for name, planner in planners.items():
                _begin(at / name, planner)
            write_json(at / POINTS, {point.name: point.values for point in points})

        name = grid_name(points[0].recipe)
        folder = shared_folder(lambda: new_folder(out, name, fill))
        runs = [(folder / name, planner) for name, planner in planners.items()]
        with _held([run for run, _ in runs]):
            _complete(runs, progress, workers)
        if distribution.is_main():
            report_grid(folder)
    return folder


def resume(folder: Path, *, device: str, progress: Progress, workers: int | None = None) -> Path:
    """Finish a run, or a grid, that was killed, interrupted or stopped by a fault.

    It ends as it would have without that, to the bit, on the same machine with the same versions.

    Args:
        folder: the run's or the grid's.
        device: ``auto`` or the kind of device that it began on.
        progress, workers: as for `run`.

    Raises:
        InputError: no unfinished run is there, another process is at work on it, or the recipe, the
            data or the kind of device is not what it began with; the message names what differs.
        RunError: a fault while running; what had finished stays.
    """
    runs = points_of(folder) or [folder]
    if not any(map(is_unfinished, runs)):
        raise InputError(f"{folder}: no unfinished run is in there")
    progress.line(f"resuming {folder}")
    recipes = {run: load_recipe(str(run / "recipe.yaml")) for run in runs}
    extend(recipes, device=device, progress=progress, workers=workers)
    if runs != [folder]:
        report_grid(folder)
    return folder


def extend(
    recipes: Mapping[Path, Recipe],
    *,
    device: str,
    progress: Progress,
    workers: int | None = None,
) -> None:
    """Do what run folders lack of recipes, which may name more contenders and seeds than they hold.

    What a run holds and its recipe does not name stays in it, and is compared with what is new.

    Args:
        recipes: by run folder; one that does not exist is made.
        device, progress, workers: as for `run`.

    Raises:
        InputError: a run holds a contender and seed of the same name that other data, another model
            or another training made, as the message says; nothing was changed.
        RunError: a fault while running; what had finished stays.
    """
    with _processes(device, progress) as (own_device, progress), ExitStack() as stack:
        known = [folder for folder in recipes if (folder / "recipe.yaml").is_file()]
        stack.enter_context(_held(known))
        runs = []
        for folder, recipe in recipes.items():
            wanted = recipe
            if folder in known:
                wanted = distribution.by_main(lambda f=folder, r=recipe: merged(f, r))
            runs.append((folder, _planner(wanted, own_device, progress)))
        if distribution.is_main():
            for folder, planner in runs:  # all are checked before anything is changed
                for job in planner.jobs if folder in known else ():
                    check_job(folder, job)
            for folder, planner in runs:
                if folder in known:
                    _add_to(folder, planner, progress)
                else:
                    with atomic_folder(folder) as partial:
                        _begin(partial, planner)
                    stack.enter_context(held(folder))
        _complete(runs, progress, workers)


def extend_grid(
    points: Sequence[Point],
    folder: Path,
    *,
    device: str,
    progress: Progress,
    workers: int | None = None,
) -> None:
    """Do what a grid lacks, new points among it, and report it all.

    Args:
        points: their recipes.
        folder: the grid's.
        device, progress, workers: as for `run`.

    Raises:
        InputError, RunError: as for `extend`.
    """
    known = read_points(folder)
    recipes = {folder / point.name: point.recipe for point in points}
    with _processes(device, progress) as (_, progress):
        if distribution.is_main():
            write_json(folder / POINTS, {**known, **{p.name: p.values for p in points}})
        extend(recipes, device=device, progress=progress, workers=workers)
        if distribution.is_main():
            report_grid(folder)


def merged(run: Path, given: Recipe) -> Recipe:
    """`given`, and what only the run holds: its contenders, in front, and its seeds.

    Raises:
        InputError: the run is one of another recipe, or has another baseline.
    """
    known = load_recipe(str(run / "recipe.yaml"))
    if given.name != known.name:
        raise InputError(f"{run}: is a run of {known.name}, not of {given.name}")
    if given.baseline.name != known.baseline.name:
        raise InputError(
            f"{run}: its baseline is {known.baseline.name}, and the recipe's is "
            f"{given.baseline.name}"
        )
    mine = {contender.name: contender for contender in given.contenders}
    before = [mine.pop(contender.name, contender) for contender in known.contenders]
    seeds = list(dict.fromkeys([*known.seeds, *given.seeds]))
    return given.model_copy(update={"contenders": [*before, *mine.values()], "seeds": seeds})


def grid_name(recipe: Recipe) -> str:
    """What the folders of a recipe's grids are called, before their numbers."""
    return f"{recipe.name}-grid"


def read_points(folder: Path) -> dict[str, dict[str, Any]]:
    """The values of a grid's points, by the names of their run folders.

    Raises:
        InputError: it is not the folder of a grid.
    """
    file = folder / POINTS
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except FileNotFoundError:
        raise InputError(f"{folder}: not the folder of a grid") from None
    except (OSError, ValueError, TypeError):
        raise InputError(f"{file}: is damaged") from None


def report_grid(folder: Path) -> dict[str, Path]:
    """Write the report of a grid from the runs of its points."""
    points = [
        GridPoint(values, read_run(folder / name))
        for name, values in read_points(folder).items()
        if (folder / name / "recipe.yaml").is_file()
    ]
    return write_grid(points, folder)


@contextmanager
def _processes(device: str, progress: Progress) -> Iterator[tuple[torch.device, Progress]]:
    """Join the processes that a launcher has started; all but the first are silent."""
    usable = resolve_device(device)
    if usable.index:
        raise InputError(
            f"--device {device}: choose the accelerator from outside, with "
            f"CUDA_VISIBLE_DEVICES={usable.index} and --device {usable.type}"
        )
    with distribution.joined(usable) as own:
        yield own, progress if distribution.is_main() else SilentProgress()


def _planner(recipe: Recipe, device: torch.device, progress: Progress) -> Planner:
    check_recipe(recipe, device)
    progress.update(f"preparing corpus {recipe.corpus}")
    prepared = distribution.main_first(lambda: prepare(recipe, device))
    check_same_data(prepared)
    return Planner(prepared)


@contextmanager
def _held(runs: Iterable[Path]) -> Iterator[None]:
    """Hold the locks of some runs; the first process does so for all."""
    with ExitStack() as stack:
        for folder in runs if distribution.is_main() else ():
            stack.enter_context(held(folder))
        yield


def _begin(folder: Path, planner: Planner) -> None:
    write_run(folder, planner, describe_environment(planner.prepared.device))


def _add_to(folder: Path, planner: Planner, progress: Progress) -> None:
    """Note in a run folder what is to be done in it now."""
    environment = describe_environment(planner.prepared.device)
    note_changes(folder / "environment.json", environment, progress)
    if planner.left(folder) or not (folder / "report.html").exists():
        mark_unfinished(folder)
    write_text(folder / "recipe.yaml", dump_recipe(planner.prepared.recipe))
    for job in planner.left(folder):
        write_job(folder, job)


def _complete(runs: Runs, progress: Progress, workers: int | None) -> None:
    """Do whatever of the runs is not done yet, then write their reports."""
    with _noting([folder for folder, _ in runs]):
        with Here(progress) if workers is None else RayWorkers(workers, progress) as executor:
            carry_out(runs, executor)
        for folder, _ in runs if distribution.is_main() else ():
            found = read_run(folder)
            if found.outcomes:
                write_report([found], folder)
            finish(folder)
            if not found.outcomes:
                why = found.diverged[0].diverged
                raise NotFiniteError(f"every training diverged, the first: {why}")


@contextmanager
def _noting(runs: Sequence[Path]) -> Iterator[None]:
    """Note on whatever ends the runs, an interrupt too, what there is and how to resume."""
    folder = runs[0] if len(runs) == 1 else runs[0].parent
    try:
        yield
    except BaseException as error:  # passed on as it is, with the notes
        finished = any(path for run in runs for path in run.glob("*/*/result.json"))
        error.add_note(
            f"what finished is in {folder}" if finished else f"nothing had finished in {folder}"
        )
        if is_out_of_memory(error):
            error.add_note(
                "a lower training.batch_size (and evaluation.batch_size), a higher "
                "training.accumulation or a lower sequence_length needs less"
            )
        if not isinstance(error, (InputError, NotFiniteError)):
            error.add_note(f"to resume: contextlm run --resume {shlex.quote(str(folder))}")
        raise
