"""Grids: a recipe at every combination of some keys' values, each a run of its own."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from contextlm.base.errors import InputError
from contextlm.base.strict_yaml import parse
from contextlm.recipe.loading import load_recipe
from contextlm.recipe.schema import Recipe


@dataclass(frozen=True)
class Point:
    """One combination of values, the recipe with them, and the name of its run folder.

    A recipe as it is counts as one point, without values or a name.
    """

    values: dict[str, Any]
    recipe: Recipe
    name: str


def read_grid(texts: Sequence[str], fixed: Sequence[str] = ()) -> dict[str, list[Any]]:
    """The values of each key, from ``key=a,b,c`` texts; values are YAML, as for ``--set``.

    Args:
        texts: what the command line gave.
        fixed: ``--set`` texts, whose keys the grid must not have.

    Raises:
        InputError: a key or value is missing or stands twice.
    """
    grid: dict[str, list[Any]] = {}
    set_keys = {text.partition("=")[0].strip() for text in fixed}
    for text in texts:
        where = f"--grid {text!r}"
        key, equals, listed = text.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            raise InputError(f"{where}: expected key=a,b,c, e.g. training.learning_rate=1e-3,2e-3")
        if key.partition(".")[0] == "seeds":
            raise InputError(f"{where}: seeds are given with --seeds")
        if key in grid:
            raise InputError(f"{where}: {key} stands twice")
        if key in set_keys:
            raise InputError(f"{where}: {key} is also given with --set")
        values = parse(f"[{listed}]", where, comments=False)
        if not isinstance(values, list) or not values or listed.rstrip().endswith(","):
            raise InputError(f"{where}: a value is missing")
        known = [json.dumps(value, sort_keys=True, default=str) for value in values]
        twice = next((value for value in known if known.count(value) > 1), None)
        if twice is not None:
            raise InputError(f"{where}: {twice} stands twice")
        grid[key] = values
    return grid


def points_of_grid(
    name_or_path: str,
    grid: Mapping[str, Sequence[Any]],
    *,
    scale: str | None = None,
    overrides: Sequence[str] = (),
    seeds: list[int] | None = None,
) -> list[Point]:
    """Every combination of the grid's values, the last key's changing fastest.

    Raises:
        InputError: a recipe that results is not valid.
    """
    points = []
    for combination in itertools.product(*grid.values()):
        values = dict(zip(grid, combination, strict=True))
        chosen = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        recipe = load_recipe(
            name_or_path, scale=scale, overrides=[*overrides, *chosen], seeds=seeds
        )
        points.append(Point(values, recipe, _folder_name(values)))
    return points


def _folder_name(values: Mapping[str, Any]) -> str:
    """Readable, and another one for other values; empty where there are none."""
    if not values:
        return ""
    described = ",".join(f"{key.rpartition('.')[2]}={shown(v)}" for key, v in values.items())
    slug = re.sub(r"[^A-Za-z0-9.,=+-]+", "_", described)[:60].lstrip(".")
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return f"{slug}-{digest[:8]}"


def shown(value: Any) -> str:
    """A grid's value for people: text without quotes, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
