"""`contextlm list`: what there is to name in a recipe or on the command line."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from contextlm.base.errors import InputError, unknown_name
from contextlm.base.visible import shown
from contextlm.cli.options import AsJson, Imports
from contextlm.cli.output import print_json, print_table


def list_known(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="recipes|models|corpora|policies|keys",
            show_default=False,
            help="What to list; all but the keys by default.",
        ),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Argument(
            metavar="PREFIX",
            show_default=False,
            help="Only keys that begin like this; model.TYPE for the fields of a model type.",
        ),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Of keys: print docs/keys.md.")
    ] = False,
    imports: Imports = None,
    as_json: AsJson = False,
) -> None:
    """List what recipes and `contextlm compress` can name, or the keys of recipes.

    Examples:

    ```
    contextlm list
    contextlm list recipes
    contextlm list models --json
    contextlm list keys training
    contextlm list keys model.llama
    ```
    """
    if kind == "keys":
        _list_keys(prefix or "", markdown, as_json)
        return
    if prefix is not None or markdown:
        raise InputError(f"{shown(prefix or '--markdown')}: goes with `contextlm list keys` only")
    sources = {"recipes": _recipes, "models": _models, "corpora": _corpora, "policies": _policies}
    if kind is not None and kind not in sources:
        raise unknown_name("kind of thing to list:", kind, [*sources, "keys"])
    found = {name: make() for name, make in sources.items() if kind in (None, name)}
    if as_json:
        print_json(found)
        return
    for name, entries in found.items():
        columns = list(entries[0]) if entries else ["name"]
        rows = [[_shown(entry[column]) for column in columns] for entry in entries]
        print_table(columns, rows, caption=name, text=len(columns))


_MODEL = "model."


def _list_keys(prefix: str, markdown: bool, as_json: bool) -> None:
    if markdown:
        if prefix:
            raise InputError(f"--markdown: prints all keys, not only {shown(prefix)}")
        print(keys_page(), end="")
        return
    keys = _keys(prefix)
    if as_json:
        print_json({"keys": keys})
        return
    rows = [list(key.values()) for key in keys]
    print_table(list(keys[0]), rows, caption="keys", text=4)


def _keys(prefix: str) -> list[dict[str, str]]:
    """The recipe's keys that begin so, or the fields of a model type."""
    from contextlm.recipe.keys import recipe_keys

    if prefix.startswith(_MODEL):
        from contextlm.models.build import config_fields

        return [asdict(field) for field in config_fields(prefix.removeprefix(_MODEL))]
    every = recipe_keys()
    found = [asdict(key) for key in every if f"{key.name}.".startswith(f"{prefix}.")]
    found = found or [asdict(key) for key in every if key.name.startswith(prefix)]
    if not found:
        raise unknown_name("key", prefix, [*(key.name for key in every), "model.TYPE"])
    return found


def keys_page() -> str:
    """docs/keys.md: all keys of recipes, and the fields of our own model types."""
    from contextlm.models.base import architectures
    from contextlm.report.sheet import escape_markdown

    def table(rows: list[dict[str, str]]) -> list[str]:
        lines = [f"| {' | '.join(rows[0])} |", "| :--- | :--- | :--- | :--- |"]
        for name, kind, default, meaning in map(dict.values, rows):
            cells = [f"`{name}`", escape_markdown(kind), f"`{default}`" if default else ""]
            lines.append(f"| {' | '.join([*cells, escape_markdown(meaning)])} |")
        return [*lines, ""]

    lines = [
        "# Keys of a recipe",
        "",
        "Written by `contextlm list keys --markdown > docs/keys.md`; a test says when it is old.",
        "`contextlm list keys PREFIX` prints a part. A recipe also has `scales`: a mapping from a",
        "name to keys that replace these, in which, as in `--set`, contenders go by name.",
        "",
        *table(_keys("")),
    ]
    for name, description in architectures().items():
        lines += [f"## Model type `{name}`", "", escape_markdown(description), ""]
        lines += table(_keys(f"{_MODEL}{name}"))
    return "\n".join(lines).rstrip() + "\n"


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


def _policies() -> list[dict[str, Any]]:
    from contextlm import compress as compress  # registers them
    from contextlm.compress.base import policies

    return [
        {
            "name": name,
            "settings": list(policy.model_fields),
            "description": (policy.__doc__ or "").partition("\n")[0],
        }
        for name, policy in policies().items()
    ]


def _shown(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)
