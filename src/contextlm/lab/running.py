"""A comparison, from a checked recipe to a run folder with its report: begun, resumed or extended.

All three are the same: the jobs of a recipe are listed, and those without a result are done.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from contextlm.base import distribution
from contextlm.base.device import resolve_device
from contextlm.base.errors import InputError, NotFiniteError, is_out_of_memory
from contextlm.base.files import atomic_folder, write_json, write_text
from contextlm.base.progress import Progress, SilentProgress
from contextlm.lab.environment import check_imported, describe_environment, note_changes
from contextlm.lab.executors import Executor, Runs, carry_out, new_executor
from contextlm.lab.grid import Point
from contextlm.lab.jobs import Planner, check_job, write_job
from contextlm.lab.preparation import prepare
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
from contextlm.lab.watch import watched
from contextlm.recipe.loading import dump_recipe, load_recipe
from contextlm.recipe.schema import Recipe
from contextlm.report.grid import GridPoint, write_grid
from contextlm.report.page import write_report
from contextlm.results.result import read_run
from contextlm.training.next_token import check_processes


def run(
    recipe: Recipe,
    out: Path,
    *,
    device: str,
    progress: Progress,
    workers: int | None = None,
    track: Sequence[str] = (),
) -> Path:
    """Train and measure every contender with every seed, and write the report.

    Args:
        recipe: the comparison.
        out, device, progress, workers, track: as for `run_points`.

    Returns:
        The run folder.
    """
    point = Point({}, recipe, "")
    return run_points([point], out, device=device, progress=progress, workers=workers, track=track)


def run_points(
    points: Sequence[Point],
    out: Path,
    *,
    device: str,
    progress: Progress,
    workers: int | None = None,
    watch: bool = False,
    track: Sequence[str] = (),
) -> Path:
    """Run a recipe, or every point of a grid: each is a run folder of its own, with its report.

    Where a launcher (torchrun, accelerate) started several processes, all call this and share each
    job; the first alone writes and tells `progress`.

    Args:
        points: of a grid; one without values for a recipe as it is.
        out: where run folders go; this run or grid gets a new numbered one.
        device: ``auto``, ``cpu``, ``cuda`` ...
        progress: gets headings, epochs and what is at work.
        workers: do the jobs in so many workers of Ray instead of this process.
        watch: serve the page of the run on this machine while it is at work.
        track: names of trackers that get losses, validation and configuration of every job.

    Returns:
        The folder of the run, or of the grid, which holds those of its points and a report of all.

    Raises:
        InputError: a recipe, its corpus or the device is not usable; nothing was written.
        RunError: a fault while running; what had finished stays.
    """
    with _processes(device, progress) as (own_device, progress):
        executor = new_executor(workers, progress, track)
        planners = {p.name: _planner(p.recipe, own_device, progress) for p in points}

        def fill(at: Path) -> None:
            for name, planner in planners.items():
                write_run(at / name, planner, describe_environment(own_device))
            _note_points(at, points)

        folder = _shared_folder(lambda: new_folder(out, folder_name(points), fill))
        runs = [(folder / name, planner) for name, planner in planners.items()]
        with _held({folder, *(run for run, _ in runs)}), _watched(watch, folder, progress):
            _complete(runs, folder, executor)
    return folder


def resume(
    folder: Path,
    *,
    device: str,
    progress: Progress,
    workers: int | None = None,
    watch: bool = False,
    track: Sequence[str] = (),
) -> Path:
    """Finish a run, or a grid, that was killed, interrupted or stopped by a fault.

    It ends as it would have without that, to the bit, on the same machine with the same versions.

    Args:
        folder: the run's or the grid's.
        device: ``auto`` or the kind of device that it began on.
        progress, workers, watch, track: as for `run_points`.

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
    return _extend(recipes, folder, device, progress, workers, watch, track)


def extend(
    points: Sequence[Point],
    folder: Path,
    *,
    device: str,
    progress: Progress,
    workers: int | None = None,
    watch: bool = False,
    track: Sequence[str] = (),
) -> Path:
    """Do what a run or grid lacks of recipes, which may name more contenders, seeds and points.

    What it holds and the recipes do not name stays in it, and is compared with what is new.

    Args:
        points: as for `run_points`.
        folder: of the run or the grid.
        device, progress, workers, watch, track: as for `run_points`.

    Raises:
        InputError: there is no such run or grid, or it holds a contender and seed of the same name
            that other data, another model or another training made: the message names the keys
            that differ. Nothing was changed.
        RunError: a fault while running; what had finished stays.
    """
    if points[0].values:
        read_points(folder)
    elif not (folder / "recipe.yaml").is_file():
        raise InputError(f"{folder}: not a run folder")
    recipes = {folder / point.name: point.recipe for point in points}
    return _extend(recipes, folder, device, progress, workers, watch, track, points)


def _extend(
    recipes: Mapping[Path, Recipe],
    folder: Path,
    device: str,
    progress: Progress,
    workers: int | None,
    watch: bool,
    track: Sequence[str],
    points: Sequence[Point] = (),
) -> Path:
    with _processes(device, progress) as (own_device, progress), ExitStack() as stack:
        executor = new_executor(workers, progress, track)
        stack.enter_context(_held({folder}))
        known = [run for run in recipes if (run / "recipe.yaml").is_file()]
        stack.enter_context(_held(set(known) - {folder}))
        runs = []
        for run, recipe in recipes.items():
            wanted = recipe
            if run in known:
                check_imported(run)
                wanted = distribution.by_main(partial(merged, run, recipe))
            runs.append((run, _planner(wanted, own_device, progress)))
        if distribution.is_main():
            for run, planner in runs:  # all are checked before anything is changed
                for job in planner.jobs if run in known else ():
                    check_job(run, job)
            environment = describe_environment(own_device)
            _note_points(folder, points)
            for run, planner in runs:
                if run in known:
                    _add_to(run, planner, environment, progress)
                else:
                    with atomic_folder(run) as new:
                        write_run(new, planner, environment)
                    stack.enter_context(held(run))
        with _watched(watch, folder, progress):
            _complete(runs, folder, executor)
    return folder


def merged(run: Path, given: Recipe) -> Recipe:
    """`given`, and what only the run holds: its contenders, in front, its seeds and budgets.

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
    if (known.budgets is None) != (given.budgets is None):
        has, lacks = ("the run", "recipe") if given.budgets is None else ("the recipe", "run")
        raise InputError(f"{run}: {has} has budgets, the {lacks} none")
    both: dict[str, Any] = {
        "contenders": [*before, *mine.values()],
        "seeds": list(dict.fromkeys([*known.seeds, *given.seeds])),
    }
    if given.budgets is not None:
        both["budgets"] = sorted({*(known.budgets or []), *given.budgets})
    return given.model_copy(update=both)


def folder_name(points: Sequence[Point]) -> str:
    """What the folders of such a run or grid are called, before their numbers."""
    name = points[0].recipe.name
    return f"{name}-grid" if points[0].values else name


def _note_points(folder: Path, points: Sequence[Point]) -> None:
    """Note the values of a grid's points in its folder."""
    values = {point.name: point.values for point in points if point.values}
    if values:
        known = read_points(folder) if (folder / POINTS).exists() else {}
        write_json(folder / POINTS, {**known, **values})


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
    """The recipe, prepared; several processes must be able to share its batches and its data."""
    for contender in recipe.contenders:
        check_processes(recipe.training_of(contender), f"contenders.{contender.name}: training")
    if recipe.embedding.source == "learned" and recipe.embedding.batch_size % distribution.world():
        raise InputError(
            f"embedding.batch_size {recipe.embedding.batch_size} cannot be shared equally by "
            f"{distribution.world()} processes"
        )
    progress.update(f"preparing corpus {recipe.corpus}")
    prepared = distribution.main_first(lambda: prepare(recipe, device))
    if repetition := prepared.facts.repetition():
        progress.line(repetition)
    for match in prepared.matches.values():
        progress.line(match.sentence)
    for rank, fingerprint in enumerate(distribution.everyones(prepared.fingerprint)):
        if fingerprint != prepared.fingerprint:
            raise InputError(
                f"corpus {prepared.facts.name!r}: rank {rank} has other data than rank "
                f"{distribution.rank()}: its machine has another Python, corpus or cache"
            )
    return Planner(prepared)


def _shared_folder(make: Callable[[], Path]) -> Path:
    """The folder that `make` makes on rank 0, on every rank."""
    folder = distribution.by_main(make)
    for rank, seen in enumerate(distribution.everyones(folder.is_dir())):
        if not seen:
            raise InputError(
                f"--out: rank {rank} does not see {folder}: run folders must lie where all "
                "machines see them"
            )
    return folder


@contextmanager
def _held(runs: Iterable[Path]) -> Iterator[None]:
    """Hold the locks of some runs; the first process does so for all."""
    with ExitStack() as stack:
        for folder in runs if distribution.is_main() else ():
            stack.enter_context(held(folder))
        yield


def _add_to(run: Path, planner: Planner, environment: dict[str, Any], progress: Progress) -> None:
    """Note in a run folder what is to be done in it now."""
    note_changes(run / "environment.json", environment, progress)
    left = planner.left(run)
    if left or not (run / "report.html").exists():
        mark_unfinished(run)
    write_text(run / "recipe.yaml", dump_recipe(planner.prepared.recipe))
    for job in left:
        write_job(run, job)


def _watched(watch: bool, folder: Path, progress: Progress) -> AbstractContextManager[object]:
    return watched(folder, progress) if watch and distribution.is_main() else nullcontext()


def _complete(runs: Runs, folder: Path, executor: Executor) -> None:
    """Do whatever of the runs is not done yet, then write their reports."""
    with _noting(folder):
        with executor:
            carry_out(runs, executor)
        if not distribution.is_main():
            return
        outcomes = []
        for run, _ in runs:
            found = read_run(run)
            outcomes += found.outcomes
            write_report([found], run)
            finish(run)
        if points_of(folder):
            report_grid(folder)
        reasons = [outcome.result.diverged for outcome in outcomes]
        if all(reasons):
            raise NotFiniteError(f"every training diverged, the first: {reasons[0]}")


@contextmanager
def _noting(folder: Path) -> Iterator[None]:
    """Note on whatever ends the runs, an interrupt too, what there is and how to resume."""
    try:
        yield
    except BaseException as error:  # passed on as it is, with the notes
        finished = any(folder.rglob("seed-*/result.json"))
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
