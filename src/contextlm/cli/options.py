"""Arguments and options that several commands share, and how a count is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        show_default=False,
        help="A saved model with its tokenizer, e.g. runs/demo-001/NAME/seed-0/checkpoint.",
    ),
]


def _import(names: list[str] | None) -> list[str] | None:
    if names:
        from contextlm.models.outside import import_outside

        import_outside(names)
    return names


# Imported while the command line is read, so that all which follows knows it.
Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="FILE|MODULE",
        callback=_import,
        show_default=False,
        help="Python code that registers architectures or mixers of your own; it is run. May be "
        "repeated.",
    ),
]
Device = Annotated[
    str,
    typer.Option(metavar="NAME", help="auto takes cuda, else mps, else cpu; or cpu, cuda, mps."),
]
TrainedModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="A folder with a trained model and its tokenizer, or a name on the hub.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def count(help_text: str, *, least: int = 1, most: int = 10**9, metavar: str = "N") -> Any:
    """An option that takes a whole number from `least` to `most`."""
    return typer.Option(metavar=metavar, min=least, max=most, help=help_text)


def optional(metavar: str, help_text: str) -> Any:
    """An option without a default to speak of."""
    return typer.Option(metavar=metavar, show_default=False, help=help_text)
