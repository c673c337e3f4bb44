"""Sweeps: a recipe in several settings, every contender and seed of each as a task of Ray.

A sweep's folder holds one run folder a setting, so that `contextlm report` works on each. A task
works in a hidden folder and moves its result to its place when it has finished, so what is in place
is whole, and a sweep that is started again leaves it alone.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contextlm.base.errors import ContextLMError, InputError, RunError
from contextlm.base.files import write_text
from contextlm.base.locks import locked
from contextlm.base.progress import Progress, SilentProgress
from contextlm.lab.sweep_grid import Setting, Task, tasks_of
from contextlm.recipe.schema import Recipe, dump_recipe
from contextlm.report.grid import GridPoint
from contextlm.results.facts import TuningFacts
from contextlm.results.result import read_run, seed_folder

_LOCK = ".lock"
EXTRA = "contextlm sweep needs Ray: pip install 'contextlm[sweep]'"


@dataclass(frozen=True)
class Resources:
    """What Ray reserves for a task; `gpus` None: one where the cluster has any."""

    cpus: float = 1
    gpus: float | None = None


@dataclass(frozen=True)
class SweepOutcome:
    """The settings with what has finished, how many tasks were done before, and what failed."""

    settings: list[GridPoint]
    tasks: int
    reused: int
    failed: dict[str, str]


def check_ray() -> None:
    """Raise an InputError that names the extra if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise InputError(EXTRA)


def run_sweep(
    settings: Sequence[Setting], *, device: str, resources: Resources, progress: Progress
) -> SweepOutcome:
    """Run what has not finished yet, and read all results.

    Args:
        settings: as `settings_of` gives them; each recipe and its data are checked first.
        device: for every task: ``auto``, ``cpu``, ``cuda``.
        resources: of a task.
        progress: is told what finishes.

    Raises:
        InputError: Ray is missing, a recipe does not fit its data, no machine has the resources, or
            another process is at work on the sweep; nothing has been started.
        RunError: Ray cannot be started or reached.
    """
    check_ray()
    from contextlm.lab.preparation import prepare

    for setting in settings:
        progress.update(f"preparing {setting.recipe.corpus} for {setting.folder.name}")
        prepare(setting.recipe)  # also fills the cache that the tasks read
    tasks = tasks_of(settings)
    place = settings[0].folder.parent
    place.mkdir(parents=True, exist_ok=True)
    with locked(place / _LOCK, str(place)):
        waiting = [task for task in tasks if not task.finished]
        for setting in settings:
            write_text(setting.folder / "recipe.yaml", dump_recipe(setting.recipe))
        failed = _run_tasks(waiting, device, resources, progress) if waiting else {}
    runs = [
        GridPoint(setting.values, read_run(setting.folder))
        for setting in settings
        if (setting.folder / "environment.json").is_file()
    ]
    return SweepOutcome(runs, len(tasks), len(tasks) - len(waiting), failed)


def _run_tasks(
    tasks: Sequence[Task], device: str, resources: Resources, progress: Progress
) -> dict[str, str]:
    """Run tasks, as many at once as fit; what failed, by name, with the reason."""
    import ray

    started = not ray.is_initialized()
    if started:
        _start_ray()
    try:
        options = {"num_cpus": resources.cpus, "num_gpus": _gpus(resources, device)}
        _check_resources(ray.nodes(), options)
        tune = ray.remote(tune_task).options(**options, max_retries=0)
        train = ray.remote(run_task).options(**options, max_retries=0)
        tuned: dict[tuple[Path, str], Any] = {}
        running: dict[Any, str] = {}
        for task in tasks:
            recipe, folder = task.setting.recipe, task.setting.folder.absolute()
            key = (folder, task.contender)
            if recipe.tuning is not None and key not in tuned:  # one serves all seeds
                tuned[key] = tune.remote(recipe, task.contender, folder, device)
                running[tuned[key]] = f"{folder.name}: {task.contender}, learning rate"
            # Ray starts a task when what it is given has been made.
            begun = train.remote(recipe, task.contender, task.seed, folder, device, tuned.get(key))
            running[begun] = task.name
        return _collect(running, set(tuned.values()), progress)
    finally:
        if started:
            ray.shutdown()  # also ends tasks that still run, after an interrupt


def _collect(
    running: dict[Any, str], tunings: Collection[Any], progress: Progress
) -> dict[str, str]:
    """Wait for all that is running; which of it failed, but for tunings: their seeds fail too."""
    import ray

    failed: dict[str, str] = {}
    total = len(running)
    with progress.bar(total, "tasks") as bar:
        while running:
            (reference,), _ = ray.wait(list(running), num_returns=1)
            name = running.pop(reference)
            count = f"{total - len(running)}/{total}"
            try:
                ray.get(reference)
                progress.line(f"{count}  {name}")
            except ray.exceptions.RayError as error:
                reason = _reason(error)
                progress.line(f"{count}  failed: {name}: {reason}")
                if reference not in tunings:
                    failed[name] = reason
            bar.advance()
    return failed


def _reason(error: Exception) -> str:
    """One line: our own error's words, else kind and first words of what went wrong."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, ContextLMError):
        return str(cause)
    first = next((line for line in str(cause).splitlines() if line.strip()), "")
    return f"{type(cause).__name__}: {first.strip()}"


def _start_ray() -> None:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(address="auto", **quiet)
        else:
            ray.init(include_dashboard=False, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"Ray cannot be started or reached: {reason}") from None


def _gpus(resources: Resources, device: str) -> float:
    import ray

    if resources.gpus is not None:
        return resources.gpus
    return 1 if device != "cpu" and ray.cluster_resources().get("GPU", 0) else 0


def _check_resources(nodes: Sequence[Mapping[str, Any]], options: Mapping[str, float]) -> None:
    """Ray would wait for ever for a machine that nobody has."""
    for option, kind in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
        most = max((node["Resources"].get(kind, 0) for node in nodes if node["Alive"]), default=0)
        if options[option] > most:
            raise InputError(
                f"--{option[4:]}-per-task {options[option]:g}: no machine has so many, "
                f"the largest has {most:g}"
            )


def tune_task(recipe: Recipe, contender: str, run: Path, device: str) -> TuningFacts | None:
    """Find a contender's learning rate, wherever Ray puts it; trials stay in the run folder.

    Args:
        recipe: the setting's.
        contender: its name.
        run: the setting's run folder.
        device: ``auto``, ``cpu``, ``cuda``.
    """
    from contextlm.lab.experiment import tune_one

    return tune_one(recipe, contender, run, device=device, progress=SilentProgress())


def run_task(
    recipe: Recipe,
    contender: str,
    seed: int,
    run: Path,
    device: str,
    tuning: TuningFacts | None,
) -> None:
    """One task, wherever Ray puts it: train and measure, then move the result to its place.

    Args:
        recipe: the setting's, with all contenders: they decide the text together.
        contender: its name.
        seed: which one.
        run: the setting's run folder.
        device: ``auto``, ``cpu``, ``cuda``.
        tuning: what `tune_task` found.
    """
    from contextlm.lab.experiment import run_one

    place = seed_folder(run, contender, seed)
    work = run / f".{contender}-seed-{seed}.part"
    shutil.rmtree(work, ignore_errors=True)  # what a task that was ended left
    try:
        made = run_one(
            recipe, contender, seed, work, device=device, progress=SilentProgress(), tuning=tuning
        )
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        (work / "environment.json").replace(run / "environment.json")
        made.rename(place)
    finally:
        shutil.rmtree(work, ignore_errors=True)
