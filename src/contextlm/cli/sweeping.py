"""`contextlm sweep`: a recipe in several settings, as tasks of Ray."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from contextlm.base.errors import InputError, RunError
from contextlm.cli.comparisons import (
    AsJson,
    Device,
    Overrides,
    RecipeName,
    Scale,
    read_seeds,
)
from contextlm.cli.output import plain, print_comparison, print_json, writable_folder

if TYPE_CHECKING:
    from contextlm.lab.sweep import SweepOutcome


def sweep(
    recipe: RecipeName,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=A,B,C",
            show_default=False,
            help="A key of the recipe and the values to try, as for --set; may be repeated: "
            "every combination is a setting.",
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="N|LIST",
            show_default=False,
            help="A number N for seeds 0 to N-1, or a list: 0,4,7; by default the recipe's.",
        ),
    ] = None,
    scale: Scale = None,
    overrides: Overrides = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            show_default=False,
            help="The sweep's folder, by default runs/sweep-NAME. What has finished there is kept.",
        ),
    ] = None,
    device: Device = "auto",
    cpus: Annotated[
        float,
        typer.Option("--cpus-per-task", metavar="N", help="Cores that a task gets, its threads."),
    ] = 1,
    gpus: Annotated[
        float | None,
        typer.Option(
            "--gpus-per-task",
            metavar="N",
            show_default=False,
            help="GPUs that a task gets, 0.5 for two tasks a GPU; by default 1 if there are any.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train every contender and seed of a recipe in several settings, and compare all.

    Each contender, seed and setting is a task of Ray: on this machine, or on the cluster that
    RAY_ADDRESS names. The same command again goes on where an earlier one ended. Writes sweep.md
    and sweep.json, and one run folder a setting, on which `contextlm report` works.

    Examples:

    ```
    contextlm sweep demo --grid training.learning_rate=1e-3,2e-3,4e-3 --seeds 3
    contextlm sweep my.yaml --grid training.batch_size=8,16 --grid training.schedule=linear,cosine
    ```
    """
    from contextlm.lab.sweep import Resources, check_ray, run_sweep
    from contextlm.lab.sweep_grid import read_grid, settings_of

    check_ray()
    values = read_grid(grid or [], overrides or [])
    _check_resources(cpus, gpus)
    wanted = None if seeds is None else read_seeds(seeds)
    from contextlm.recipe.schema import load_recipe

    name = load_recipe(recipe, scale=scale, overrides=overrides or [], seeds=wanted).name
    folder = writable_folder(f"runs/sweep-{name}" if out is None else out, "--out")
    settings = settings_of(
        recipe, values, folder, scale=scale, overrides=overrides or [], seeds=wanted
    )
    from contextlm.base.progress import RichProgress

    with RichProgress() as progress:
        try:
            outcome = run_sweep(
                settings, device=device, resources=Resources(cpus, gpus), progress=progress
            )
        except KeyboardInterrupt as error:
            error.add_note("the same command again goes on from here")
            raise
    report = _write(name, values, folder, outcome)
    if as_json:
        print_json(report)
    else:
        _print(folder, outcome)
    if outcome.failed:
        tasks = f"{len(outcome.failed)} of {outcome.tasks} tasks failed"
        first, reason = next(iter(outcome.failed.items()))
        raise RunError(f"{tasks}, the first: {first}: {reason}; again to retry them")


def _check_resources(cpus: float, gpus: float | None) -> None:
    for option, value in (("--cpus-per-task", cpus), ("--gpus-per-task", gpus)):
        least = 0 if option.startswith("--gpus") else 1
        if value is not None and not least <= value <= 10_000:
            raise InputError(f"{option} {value:g}: expected {least} or more")
        if value is not None and value > 1 and value % 1:
            raise InputError(f"{option} {value:g}: more than one must be a whole number")


def _write(
    name: str, grid: dict[str, list[Any]], folder: Path, outcome: SweepOutcome
) -> dict[str, Any]:
    """Write sweep.md and sweep.json; what the latter holds."""
    from contextlm.base.files import write_json
    from contextlm.report.grid import grid_facts, grid_lines, write_grid

    report: dict[str, Any] = plain(
        {
            "recipe": name,
            "sweep": folder,
            "grid": grid,
            "tasks": outcome.tasks,
            "reused": outcome.reused,
            "failed": outcome.failed,
            "rows": grid_facts(grid_lines(outcome.settings)),
        }
    )
    write_grid(outcome.settings, folder)
    write_json(folder / "sweep.json", report)
    return report


def _print(folder: Path, outcome: SweepOutcome) -> None:
    from contextlm.report.grid import best_sentences, grid_lines, grid_table

    if outcome.reused:
        print(f"{outcome.reused} of {outcome.tasks} tasks had finished before")
    lines = grid_lines(outcome.settings)
    table = grid_table(lines)
    if table.rows:
        print_comparison(table.headings, table.rows)
    for line in best_sentences(lines):
        print(line)
    for file in ("grid.md", "sweep.json"):
        print(f"{file}: {folder / file}")
