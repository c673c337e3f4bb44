"""`contextlm run` and `contextlm params`: a recipe, trained or only counted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from contextlm.base.distribution import launched_rank
from contextlm.base.errors import InputError
from contextlm.base.progress import duration
from contextlm.base.visible import shown, visible
from contextlm.cli.options import AsJson, Device, Imports
from contextlm.cli.output import (
    REPORT_FILES,
    print_comparison,
    print_json,
    print_runs,
    print_table,
    runs_json,
    scientific,
    writable_folder,
)

if TYPE_CHECKING:
    from contextlm.lab.grid import Point
    from contextlm.recipe.schema import Recipe

MOST_SEEDS = 1000

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        show_default=False,
        help="A recipe's name (`contextlm list recipes`) or the path of a YAML file.",
    ),
]
Scale = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        show_default=False,
        help="The recipe's scale: smoke (seconds), small (minutes), full (the default).",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        show_default=False,
        help="Change one of the recipe's values, after the scale; may be repeated. "
        "Contenders are addressed by name: contenders.NAME.model.context_dim=128.",
    ),
]
Grid = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=A,B,C",
        show_default=False,
        help="A key of the recipe and the values to try, as for --set; may be repeated: every "
        "combination is a run.",
    ),
]
Seeds = Annotated[
    str | None,
    typer.Option(
        metavar="N|LIST",
        show_default=False,
        help="A number N for seeds 0 to N-1, or a list: 0,4,7 (7, is seed 7 alone).",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        show_default=False,
        help="Do the jobs in N workers of Ray (pip install ray): on this machine, "
        "or on the cluster that RAY_ADDRESS names.",
    ),
]
Track = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        show_default=False,
        help="Also tell tensorboard, wandb, trackio or mlflow, several with commas between them; "
        "on this machine only, unless its own settings say otherwise.",
    ),
]


def run(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            show_default=False,
            help="A recipe's name (`contextlm list recipes`) or the path of a YAML file; with "
            "--resume it may be a run folder, or left out.",
        ),
    ] = None,
    scale: Scale = None,
    overrides: Overrides = None,
    seeds: Seeds = None,
    grid: Grid = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Finish a run that was killed or stopped: the named run folder, or the newest "
            "unfinished run of RECIPE below --out (a new one if there is none); without RECIPE the "
            "newest of all.",
        ),
    ] = False,
    into: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            show_default=False,
            help="Add the contenders and seeds that this run (or, with --grid, this grid) lacks, "
            "instead of starting a new one. It keeps those it has, which must not have changed.",
        ),
    ] = None,
    workers: Workers = None,
    imports: Imports = None,
    track: Track = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Serve the run's page while it is at work, on 127.0.0.1 alone; the address is "
            "told on stderr.",
        ),
    ] = False,
    device: Device = "auto",
    out: Annotated[
        str,
        typer.Option(metavar="FOLDER", help="Where the new, numbered run folder goes."),
    ] = "runs",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only print contenders, parameters, tokens, FLOPs, memory, and the time that a "
            "few steps of each let expect.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train every contender of a recipe, measure it, and report the comparison.

    Makes a new folder below --out with the resolved recipe, one folder for each contender and
    seed (results, history, checkpoint), and the report: report.md, report.html and plots.
    Progress goes to stderr, the table and the report's paths to stdout.

    A run that ends early, whatever ended it, is finished with --resume and ends as it would have
    without that, to the bit. It keeps its recipe and data; what differs is refused.

    With --grid every combination of values is a run of its own, in one folder with one report.

    Examples:

    ```
    contextlm run demo
    contextlm run context-pythia --scale small --set training.learning_rate=3e-4
    contextlm run my-comparison.yaml --set corpus=text:my-notes/ --seeds 3
    contextlm run context-pythia --scale small --dry-run
    contextlm run --resume runs/demo-001
    contextlm run demo --seeds 3 --into runs/demo-001
    contextlm run demo --grid training.learning_rate=1e-3,2e-3 --workers 2
    ```
    """
    if dry_run and (resume or into or grid or workers or watch or track):
        raise InputError("--dry-run: goes with a new run alone")
    options = {
        "device": device,
        "workers": workers,
        "watch": watch,
        "track": [name.strip() for name in track.split(",")] if track is not None else [],
    }
    if resume and into:
        raise InputError("--into: adds to a run; --resume only finishes what it began with")
    if resume and (recipe is None or _is_run(Path(recipe))):
        changes = {"--scale": scale, "--set": overrides, "--seeds": seeds, "--grid": grid}
        for option, value in changes.items():
            if value:
                raise InputError(f"{option}: a run is resumed with the recipe that it began with")
        from contextlm.lab.run_folder import newest_unfinished

        folder = newest_unfinished(Path(out)) if recipe is None else Path(recipe)
        _resume(folder, options, as_json)
        return
    if recipe is None:
        raise InputError("missing argument 'RECIPE'")
    points = _points(recipe, scale, overrides, grid, seeds)
    place = writable_folder(str(into or out), "--into" if into else "--out")
    from contextlm.base.files import cache_folder

    cache_folder()  # so that one that cannot be used is told before the corpus is prepared
    if dry_run:
        _show_cost(points[0].recipe, device, as_json)
        return
    from contextlm.lab import run_folder, running

    found = None
    if resume:
        name = running.folder_name(points)
        found = run_folder.unfinished_run_of([point.recipe for point in points], place, name)
        if found is None:
            print(f"no unfinished {name} below {place}: a new one", file=sys.stderr)
    if found is not None:
        _resume(found, options, as_json)
    else:
        work, place_of = (running.extend, into) if into else (running.run_points, place)
        _show(_at_work(work, points, place_of, **options), as_json)


def sweep(
    recipe: RecipeName,
    grid: Grid = None,
    seeds: Seeds = None,
    scale: Scale = None,
    overrides: Overrides = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            show_default=False,
            help="The grid's folder, by default runs/sweep-NAME. What has finished there is kept.",
        ),
    ] = None,
    device: Device = "auto",
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """The old name of `contextlm run RECIPE --grid`, which goes with the next release."""
    print(
        "contextlm sweep is now contextlm run RECIPE --grid KEY=A,B [--workers N] [--into FOLDER]; "
        "the old name goes with the next release",
        file=sys.stderr,
    )
    if not grid:
        raise InputError("--grid: expected at least one, e.g. training.learning_rate=1e-3,2e-3")
    points = _points(recipe, scale, overrides, grid, seeds)
    default = f"runs/sweep-{points[0].recipe.name}"
    place = writable_folder(default if out is None else out, "--out")
    from contextlm.lab.run_folder import POINTS

    if not (place / POINTS).exists():
        from contextlm.base.files import write_json

        write_json(place / POINTS, {})
    from contextlm.lab import running

    _show(_at_work(running.extend, points, place, device=device, workers=workers), as_json)


def _points(
    recipe: str,
    scale: str | None,
    overrides: list[str] | None,
    grid: list[str] | None,
    seeds: str | None,
) -> list[Point]:
    """The recipe at every point of the grid; without a grid at one."""
    from contextlm.lab.grid import points_of_grid, read_grid

    return points_of_grid(
        recipe,
        read_grid(grid or [], overrides or []),
        scale=scale,
        overrides=overrides or [],
        seeds=None if seeds is None else read_seeds(seeds),
    )


def _is_run(folder: Path) -> bool:
    from contextlm.lab.run_folder import POINTS

    return any((folder / name).is_file() for name in ("recipe.yaml", POINTS))


def _at_work(work: Callable[..., Path], *arguments: Any, **options: Any) -> Path:
    """What `work` returns, its progress shown; a scheduler's signal ends it like Ctrl-C."""
    from contextlm.base.interrupts import termination_raises
    from contextlm.base.progress import RichProgress

    with RichProgress() as progress, termination_raises():
        return work(*arguments, progress=progress, **options)


def _resume(folder: Path, options: dict[str, Any], as_json: bool) -> None:
    """Finish an unfinished run; of a finished one only the table is shown."""
    from contextlm.lab import running
    from contextlm.lab.run_folder import is_unfinished, points_of

    if any(map(is_unfinished, points_of(folder) or [folder])):
        _at_work(running.resume, folder, **options)
    else:
        print(f"{folder} has finished: nothing to resume", file=sys.stderr)
    _show(folder, as_json)


def _show(folder: Path, as_json: bool) -> None:
    from contextlm.lab.run_folder import points_of

    if launched_rank():
        return  # one of several processes, of which the first speaks
    if points_of(folder):
        _show_grid(folder, as_json)
    else:
        _show_run(folder, as_json)


def _show_grid(folder: Path, as_json: bool) -> None:
    from contextlm.lab.running import report_grid

    paths = report_grid(folder)
    if as_json:
        print_json({"grid": folder, "report": paths, **json.loads(paths["grid.json"].read_text())})
    else:
        print(visible(paths["grid.md"].read_text("utf-8")))
        for name, path in paths.items():
            print(f"{name}: {visible(str(path))}")


def _show_run(folder: Path, as_json: bool) -> None:
    from contextlm.results.result import read_run

    runs = [read_run(folder)]
    paths = {name: folder / name for name in REPORT_FILES}
    if as_json:
        print_json({"run": folder, **runs_json(runs, paths)})
    else:
        print_runs(runs, paths)


def params(
    recipe: RecipeName,
    scale: Scale = None,
    overrides: Overrides = None,
    imports: Imports = None,
    as_json: AsJson = False,
) -> None:
    """Count every contender's parameters on the real modules, without training or memory.

    Examples:

    ```
    contextlm params context-pythia
    contextlm params context-pythia --set contenders.context-pythia.model.context_dim=256 --json
    ```
    """
    from contextlm.lab.estimate import count_parameters
    from contextlm.recipe.loading import load_recipe

    resolved = load_recipe(recipe, scale=scale, overrides=overrides or [])
    counts = count_parameters(resolved)
    if as_json:
        print_json({"contenders": counts})
        return
    from contextlm.report.numbers import signed_percent

    headings = ["contender", "parameters", "vs baseline", "trainable"]
    rows = [
        [c.name, f"{c.total:,}", signed_percent(c.versus_baseline_percent), f"{c.trainable:,}"]
        for c in counts
    ]
    if any(c.matched for c in counts):
        headings.append("matched by")
        for row, c in zip(rows, counts, strict=True):
            row.append(", ".join(f"{field} {value:,}" for field, value in c.matched.items()))
    print_table(headings, rows)


def read_seeds(text: str) -> list[int]:
    """Seeds as the command line spells them: ``3`` is 0, 1, 2; ``0,4,7`` and ``7,`` are a list.

    Raises:
        InputError: anything else.
    """
    parts = [part.strip() for part in text.removesuffix(",").split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 20 for part in parts):
        raise InputError(
            f"--seeds {shown(text)}: expected a number of seeds or a list such as 0,4,7"
        )
    numbers = [int(part) for part in parts]
    if "," in text:
        return numbers
    if not 1 <= numbers[0] <= MOST_SEEDS:
        raise InputError(f"--seeds {shown(text)}: expected 1 to {MOST_SEEDS} seeds, or a list")
    return list(range(numbers[0]))


def _show_cost(recipe: Recipe, device: str, as_json: bool) -> None:
    from contextlm.lab.estimate import dry_run
    from contextlm.report.numbers import human_bytes

    cost = dry_run(recipe, device=device)
    if as_json:
        print_json(cost)
        return
    head = f"{cost.name}, scale {cost.scale}: {cost.corpus}, tokenizer {cost.tokenizer}, "
    counts = f"{cost.train_tokens:,} training and {cost.validation_tokens:,} validation tokens"
    print(visible(head + counts))
    rows = [
        (
            c.name,
            f"{c.total:,}",
            f"{c.trainable:,}",
            f"{c.tokens_per_epoch:,}",
            f"{c.epochs:,}",
            f"{c.seeds:,}",
            scientific(c.flops),
            "too large" if c.seconds_estimate is None else duration(c.seconds_estimate),
            human_bytes(c.memory_bytes_estimate),
        )
        for c in cost.contenders
    ]
    headings = ["contender", "parameters", "trainable", "tokens an epoch", "epochs"]
    headings += ["seeds", "FLOPs", "training time", "weights, optimiser, logits"]
    print_comparison(headings, rows)
    known = [c.seconds_estimate for c in cost.contenders if c.seconds_estimate is not None]
    print(f"training time in all, from a few steps of each: {duration(sum(known))}")
    if len(known) < len(cost.contenders):
        print("too large: more than the memory that this machine has free, so not timed")
    trials = cost.contenders[0].tuning_trials
    if trials:
        print(f"of it {trials} learning rates a contender on a part of the text; more may be tried")
    print("phase 1, data preparation and measuring come on top")
