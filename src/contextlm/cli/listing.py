"""`contextlm list`: what there is to name in a recipe or on the command line."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from contextlm.base.errors import unknown_name
from contextlm.cli.options import AsJson, Imports
from contextlm.cli.output import print_json, print_table


def list_known(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="recipes|models|corpora",
            show_default=False,
            help="What to list; everything by default.",
        ),
    ] = None,
    imports: Imports = None,
    as_json: AsJson = False,
) -> None:
    """List the recipes, the model types and the corpora that recipes can name.

    Examples:

    ```
    contextlm list
    contextlm list recipes
    contextlm list models --json
    ```
    """
    sources = {"recipes": _recipes, "models": _models, "corpora": _corpora}
    if kind is not None and kind not in sources:
        raise unknown_name("kind of thing to list:", kind, sources)
    found = {name: make() for name, make in sources.items() if kind in (None, name)}
    if as_json:
        print_json(found)
        return
    for name, entries in found.items():
        columns = list(entries[0]) if entries else ["name"]
        rows = [[_shown(entry[column]) for column in columns] for entry in entries]
        print_table(columns, rows, caption=name, text=len(columns))


def _recipes() -> list[dict[str, Any]]:
    from contextlm.recipe.loading import builtin_recipes, load_recipe, recipe_scales

    return [
        {"name": name, "scales": recipe_scales(name), "question": load_recipe(name).question}
        for name in builtin_recipes()
    ]


def _models() -> list[dict[str, Any]]:
    from contextlm.models.base import architectures
    from contextlm.models.build import baseline_types

    return [
        {"name": name, "origin": origin, "description": description}
        for origin, types in (("contextlm", architectures()), ("transformers", baseline_types()))
        for name, description in types.items()
    ]


def _corpora() -> list[dict[str, Any]]:
    from contextlm.data.corpora import CORPORA

    return [{"name": name, "description": description} for name, description in CORPORA.items()]


def _shown(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)
