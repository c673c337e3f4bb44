"""`contextlm run` and `contextlm params`: a recipe, trained or only counted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from contextlm.base.distribution import launched_rank
from contextlm.base.errors import InputError
from contextlm.base.visible import shown, visible
from contextlm.cli.output import (
    REPORT_FILES,
    duration,
    print_comparison,
    print_json,
    print_runs,
    print_table,
    runs_json,
    scientific,
    writable_folder,
)

if TYPE_CHECKING:
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
Device = Annotated[
    str,
    typer.Option(metavar="NAME", help="auto takes cuda, else mps, else cpu; or cpu, cuda, mps."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


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
    out: Annotated[
        str,
        typer.Option(metavar="FOLDER", help="Where the new, numbered run folder goes."),
    ] = "runs",
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="N|LIST",
            show_default=False,
            help="A number N for seeds 0 to N-1, or a list: 0,4,7 (7, is seed 7 alone).",
        ),
    ] = None,
    device: Device = "auto",
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with a run that was killed or stopped: the named run folder, or the newest "
            "unfinished run of RECIPE below --out (a new one if there is none); without RECIPE the "
            "newest of all.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only print contenders, parameters, tokens, FLOPs, rough time and memory.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train every contender of a recipe, measure it, and report the comparison.

    Makes a new folder below --out with the resolved recipe, one folder for each contender and
    seed (results, history, checkpoint), and the report: report.md, report.html and plots.
    Progress goes to stderr, the table and the report's paths to stdout.

    A run that ends early, whatever ended it, goes on with --resume and ends as it would have
    without that, to the bit. It keeps its recipe and data; what differs is refused.

    Examples:

    ```
    contextlm run demo
    contextlm run context-pythia --scale small --set training.learning_rate=3e-4
    contextlm run my-comparison.yaml --set corpus=text:my-notes/ --seeds 3
    contextlm run context-pythia --scale small --dry-run
    contextlm run --resume runs/demo-001
    contextlm run demo --resume
    ```
    """
    if resume and dry_run:
        raise InputError("--dry-run: goes with a new run, not with --resume")
    if resume and (recipe is None or _is_run(recipe)):
        _no_changes({"--scale": scale, "--set": overrides, "--seeds": seeds})
        from contextlm.lab.resume import newest_unfinished

        folder = newest_unfinished(Path(out)) if recipe is None else Path(recipe)
        _resume(folder, device, as_json)
        return
    if recipe is None:
        raise InputError("missing argument 'RECIPE'")
    from contextlm.recipe.loading import load_recipe

    resolved = load_recipe(
        recipe,
        scale=scale,
        overrides=overrides or [],
        seeds=None if seeds is None else read_seeds(seeds),
    )
    place = writable_folder(out, "--out")
    from contextlm.data.token_store import cache_folder

    cache_folder()  # so that one that cannot be used is told before the corpus is prepared
    if dry_run:
        _show_plan(resolved, device, as_json)
        return

    found = None
    if resume:
        from contextlm.lab.resume import unfinished_run_of

        found = unfinished_run_of(resolved, place)
        if found is None:
            print(f"no unfinished run of {resolved.name} below {place}: a new one", file=sys.stderr)
    if found is not None:
        _resume(found, device, as_json)
        return

    from contextlm.base.interrupts import termination_raises
    from contextlm.base.progress import RichProgress
    from contextlm.lab import experiment

    with RichProgress() as progress, termination_raises():
        folder = experiment.run(resolved, place, device=device, progress=progress)
    _show_run(folder, as_json)


def _is_run(name: str) -> bool:
    return (Path(name) / "recipe.yaml").is_file()


def _no_changes(options: dict[str, object]) -> None:
    for option, value in options.items():
        if value:
            raise InputError(f"{option}: a run is resumed with the recipe that it began with")


def _resume(folder: Path, device: str, as_json: bool) -> None:
    """Go on with an unfinished run; of a finished one only the table is shown."""
    from contextlm.base.interrupts import termination_raises
    from contextlm.base.progress import RichProgress
    from contextlm.lab import experiment
    from contextlm.lab.run_folder import is_unfinished
    from contextlm.results.result import read_run

    if is_unfinished(folder):
        with RichProgress() as progress, termination_raises():
            experiment.resume(folder, device=device, progress=progress)
    elif read_run(folder).missing_seeds():
        raise InputError(
            f"{folder}: lacks results and keeps no state to go on from; a sweep's goes on with the "
            "same `contextlm sweep` command"
        )
    else:
        print(f"{folder} has finished: nothing to resume", file=sys.stderr)
    _show_run(folder, as_json)


def _show_run(folder: Path, as_json: bool) -> None:
    if launched_rank():
        return  # one of several processes, of which the first speaks
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
    as_json: AsJson = False,
) -> None:
    """Count every contender's parameters on the real modules, without training or memory.

    The last column counts those that next-token training (phase 2) changes.

    Examples:

    ```
    contextlm params context-pythia
    contextlm params context-pythia --set contenders.context-pythia.model.context_dim=256 --json
    ```
    """
    from contextlm.lab.plan import count_parameters
    from contextlm.recipe.loading import load_recipe

    resolved = load_recipe(recipe, scale=scale, overrides=overrides or [])
    counts = count_parameters(resolved)
    if as_json:
        print_json({"contenders": counts})
        return
    print_table(
        ["contender", "parameters", "trainable", "in phase 2"],
        [(c.name, f"{c.total:,}", f"{c.trainable:,}", f"{c.trainable_phase2:,}") for c in counts],
    )


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


def _show_plan(recipe: Recipe, device: str, as_json: bool) -> None:
    from contextlm.lab.plan import dry_run
    from contextlm.report.numbers import human_bytes

    plan = dry_run(recipe, device=device)
    if as_json:
        print_json(plan)
        return
    head = f"{plan.name}, scale {plan.scale}: {plan.corpus}, tokenizer {plan.tokenizer}, "
    counts = f"{plan.train_tokens:,} training and {plan.validation_tokens:,} validation tokens"
    print(visible(head + counts))
    rows = [
        (
            c.name,
            f"{c.total:,}",
            f"{c.trainable:,}",
            f"{c.trainable_phase2:,}",
            f"{c.tokens_per_epoch:,}",
            f"{c.epochs:,}",
            f"{c.seeds:,}",
            scientific(c.flops),
            duration(c.seconds_estimate),
            human_bytes(c.memory_bytes_estimate),
        )
        for c in plan.contenders
    ]
    headings = ["contender", "parameters", "trainable", "in phase 2", "tokens an epoch", "epochs"]
    headings += ["seeds", "FLOPs", "training time, roughly", "weights, optimiser, logits"]
    print_comparison(headings, rows)
    total = sum(c.seconds_estimate for c in plan.contenders)
    print(f"training time in all, roughly: {duration(total)}")
    trials = plan.contenders[0].tuning_trials
    if trials:
        print(f"of it {trials} learning rates a contender on a part of the text; more may be tried")
    print("phase 1, data preparation and measuring come on top")
