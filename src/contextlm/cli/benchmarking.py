"""`contextlm bench`: speed and memory, beside a baseline, in one run."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from contextlm.base.errors import InputError, unknown_name
from contextlm.base.files import is_folder
from contextlm.benchmarks.questions import QUESTIONS
from contextlm.cli.output import print_json, print_table

if TYPE_CHECKING:
    from contextlm.benchmarks.harness import Outcome


def bench(
    question: Annotated[
        str | None,
        typer.Argument(
            metavar="QUESTION", show_default=False, help="Leave it out to see the questions."
        ),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=10**6,
            show_default=False,
            help="Timed rounds instead of the usual.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, max=1024, show_default=False, help="Threads of each operation."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", show_default=False, help="Draw what was measured."),
    ] = None,
    smoke: Annotated[
        bool,
        typer.Option("--smoke", help="Tiny sizes, to see that it runs; the figures mean nothing."),
    ] = False,
) -> None:
    """Measure one question, ours and the baseline in turns, on the CPU.

    Prints a table, the ratios with their targets, and last one line of JSON. A ratio that misses
    its target is told, and is no error. Let the machine do nothing else meanwhile.

    Examples:

    ```
    contextlm bench scan
    contextlm bench decode --plot decode.png
    ```
    """
    if question is None:
        rows = [[name, each.text] for name, each in QUESTIONS.items()]
        print_table(["question", "asks"], rows, text=2)
        return
    if question not in QUESTIONS:
        raise unknown_name("question", question, list(QUESTIONS))
    if plot is not None and (plot.suffix != ".png" or not is_folder(plot.parent)):
        raise InputError(f"--plot {plot}: expected a .png file in a folder that exists")

    import importlib

    import torch

    from contextlm.benchmarks.harness import Setting

    if threads is not None:
        torch.set_num_threads(threads)
    module = importlib.import_module(f"contextlm.benchmarks.{QUESTIONS[question].module}")
    outcome: Outcome = module.measure(Setting(repeats, smoke))
    if plot is not None:
        from contextlm.benchmarks.plots import draw

        draw(question, outcome, plot)
    _show(outcome, judged=not smoke)
    print_json(
        {
            "question": question,
            "smoke": smoke,
            "ratios": outcome.ratios,
            "targets": {name: target.text() for name, target in outcome.targets.items()},
            "settings": outcome.settings,
            "rows": outcome.rows,
            "environment": {
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "processor": platform.machine(),
                "python": platform.python_version(),
            },
        }
    )


def _show(outcome: Outcome, *, judged: bool) -> None:
    columns = list(dict.fromkeys(key for row in outcome.rows for key in row))
    print_table(columns, [[_cell(row.get(key)) for key in columns] for row in outcome.rows])
    compared = []
    for name, ratio in outcome.ratios.items():
        target = outcome.targets.get(name)
        wanted = "" if target is None else target.text()
        verdict = "" if target is None or not judged else "met" if target.met(ratio) else "missed"
        compared.append([name, f"{ratio:.3g}", wanted, verdict])
    print_table(["ratio", "measured", "target", "outcome"], compared)


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)
