"""`contextlm bench`: speed and memory, beside a baseline, in one run."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from contextlm.base.errors import InputError, unknown_name
from contextlm.base.files import is_folder
from contextlm.benchmarks import QUESTIONS
from contextlm.cli.options import count, optional
from contextlm.cli.output import print_json, print_table

if TYPE_CHECKING:
    from contextlm.benchmarks.harness import Answer


def bench(
    question: Annotated[
        str | None,
        typer.Argument(
            metavar="QUESTION", show_default=False, help="Leave it out to see the questions."
        ),
    ] = None,
    repeats: Annotated[int | None, count("Timed rounds instead of the usual.", most=10**6)] = None,
    threads: Annotated[int | None, count("Threads of each operation.", most=1024)] = None,
    plot: Annotated[Path | None, optional("FILE.png", "Draw what was measured.")] = None,
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
        print_table(["question", "asks"], [[*pair] for pair in QUESTIONS.items()], text=2)
        return
    if question not in QUESTIONS:
        raise unknown_name("question", question, list(QUESTIONS))
    if plot is not None and (plot.suffix != ".png" or not is_folder(plot.parent)):
        raise InputError(f"--plot {plot}: expected a .png file in a folder that exists")

    import gc
    import importlib

    import torch

    from contextlm.benchmarks.harness import Options, draw

    if threads is not None:
        torch.set_num_threads(threads)
    module = importlib.import_module(f"contextlm.benchmarks.{question.replace('-', '_')}")
    gc.collect()
    gc.freeze()  # what was imported: collecting it again before each call would take most time
    try:
        answer: Answer = module.measure(Options(repeats, smoke))
    finally:
        gc.unfreeze()
    if plot is not None:
        draw(question, answer, plot)
    _show(answer, judged=not smoke)
    print_json(
        {
            "question": question,
            "smoke": smoke,
            "ratios": answer.ratios,
            "targets": {name: target.text() for name, target in answer.targets.items()},
            "settings": answer.settings,
            "rows": answer.rows,
            "environment": {
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "processor": platform.machine(),
                "python": platform.python_version(),
            },
        }
    )


def _show(answer: Answer, *, judged: bool) -> None:
    columns = list(dict.fromkeys(key for row in answer.rows for key in row))
    print_table(columns, [[_cell(row.get(key)) for key in columns] for row in answer.rows])
    compared = []
    for name, ratio in answer.ratios.items():
        target = answer.targets.get(name)
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
