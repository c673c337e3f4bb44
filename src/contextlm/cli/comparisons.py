"""`contextlm run` and `contextlm params`: a recipe, trained or only counted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

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
from contextlm.distribution import launched_rank
from contextlm.errors import InputError

if TYPE_CHECKING:
    from contextlm.recipe import Recipe

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
    typer.Option(
        metavar="NAME", help="auto takes cuda, else mps, else cpu; or cpu, cuda, cuda:1 ..."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def run(
    recipe: RecipeName,
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

    Examples:

    ```
    contextlm run demo
    contextlm run context-pythia --scale small --set training.learning_rate=3e-4
    contextlm run my-comparison.yaml --set corpus=text:my-notes/ --seeds 3
    contextlm run context-pythia --scale small --dry-run
    ```
    """
    from contextlm.recipe import load_recipe

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

    from contextlm import experiment
    from contextlm.evaluation.result import read_run
    from contextlm.progress import RichProgress

    with RichProgress() as progress:
        folder = experiment.run(resolved, place, device=device, progress=progress)
    if launched_rank():
        return  # one of several processes, of which the first speaks
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
    from contextlm.plan import count_parameters
    from contextlm.recipe import load_recipe

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
        raise InputError(f"--seeds {text!r}: expected a number of seeds or a list such as 0,4,7")
    numbers = [int(part) for part in parts]
    if "," in text:
        return numbers
    if not 1 <= numbers[0] <= MOST_SEEDS:
        raise InputError(f"--seeds {text!r}: expected 1 to {MOST_SEEDS} seeds, or a list")
    return list(range(numbers[0]))


def _show_plan(recipe: Recipe, device: str, as_json: bool) -> None:
    from contextlm.plan import dry_run
    from contextlm.report.numbers import human_bytes

    plan = dry_run(recipe, device=device)
    if as_json:
        print_json(plan)
        return
    print(
        f"{plan.name}, scale {plan.scale}: {plan.corpus}, tokenizer {plan.tokenizer}, "
        f"{plan.train_tokens:,} training and {plan.validation_tokens:,} validation tokens"
    )
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
    print("phase 1, data preparation and measuring come on top")
