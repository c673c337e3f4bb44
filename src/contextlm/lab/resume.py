"""Which run `contextlm run --resume` goes on with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contextlm.base.errors import InputError
from contextlm.lab.run_folder import is_unfinished
from contextlm.recipe.loading import load_recipe
from contextlm.recipe.schema import Recipe

_NUMBERED = re.compile(r".+-\d{3,}")


def unfinished_runs(out: Path) -> list[Path]:
    """The unfinished runs below `out`, the one that began last first."""
    if not out.is_dir():
        return []
    found = [p for p in out.iterdir() if _NUMBERED.fullmatch(p.name) and is_unfinished(p)]
    return sorted(found, key=lambda run: (run / "recipe.yaml").stat().st_mtime_ns, reverse=True)


def newest_unfinished(out: Path) -> Path:
    """The unfinished run below `out` that began last.

    Raises:
        InputError: there is none.
    """
    runs = unfinished_runs(out)
    if not runs:
        raise InputError(f"--resume: there is no unfinished run below {out}")
    return runs[0]


def unfinished_run_of(recipe: Recipe, out: Path) -> Path | None:
    """The unfinished run of `recipe` below `out` that began last; None if there is none.

    Raises:
        InputError: there are unfinished runs of a recipe with this name, but all of other settings;
            the message names a key that differs.
    """
    differing = None
    for run in unfinished_runs(out):
        if not re.fullmatch(rf"{re.escape(recipe.name)}-\d+", run.name):
            continue
        key = _difference(load_recipe(str(run / "recipe.yaml")), recipe)
        if key is None:
            return run
        differing = differing or (run, key)
    if differing is None:
        return None
    run, key = differing
    raise InputError(
        f"--resume: the recipe is not that of the unfinished {run}: {key} differs (leave out "
        f"--resume to begin a new run, or `contextlm run --resume {run}` to go on with that one)"
    )


def _difference(one: Recipe, other: Recipe) -> str | None:
    """The dotted key of the first difference between two recipes."""
    dumps = [recipe.model_dump(mode="json", exclude={"written"}) for recipe in (one, other)]
    return _differing(*dumps)


def _differing(one: Any, other: Any) -> str | None:
    if one == other:
        return None
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in dict.fromkeys([*one, *other]):
            if one.get(key) != other.get(key):
                below = _differing(one.get(key), other.get(key))
                return f"{key}.{below}" if below else str(key)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            if pair[0] != pair[1]:
                name = pair[0].get("name", index) if isinstance(pair[0], Mapping) else index
                below = _differing(*pair)
                return f"{name}.{below}" if below else str(name)
    return ""
