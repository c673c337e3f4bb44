"""The settings of a sweep: a grid of values over a recipe, and the tasks that come of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contextlm.base.errors import InputError
from contextlm.base.strict_yaml import parse
from contextlm.recipe.loading import dump_recipe, load_recipe
from contextlm.recipe.schema import Recipe
from contextlm.results.result import seed_folder


@dataclass(frozen=True)
class Setting:
    """One point of the grid: its keys' values, the recipe with them, and its run folder."""

    values: dict[str, Any]
    recipe: Recipe
    folder: Path


@dataclass(frozen=True)
class Task:
    """One contender with one seed in one setting."""

    setting: Setting
    contender: str
    seed: int

    @property
    def place(self) -> Path:
        """Where its result belongs."""
        return seed_folder(self.setting.folder, self.contender, self.seed)

    @property
    def finished(self) -> bool:
        """Whether it is there."""
        return (self.place / "result.json").is_file()

    @property
    def name(self) -> str:
        """For people."""
        values = ", ".join(f"{key}={shown(value)}" for key, value in self.setting.values.items())
        return f"{values}: {self.contender}, seed {self.seed}"


def read_grid(texts: Sequence[str], fixed: Sequence[str] = ()) -> dict[str, list[Any]]:
    """The values of each key, from ``key=a,b,c`` texts; values are YAML, as for ``--set``.

    Args:
        texts: what the command line gave.
        fixed: ``--set`` texts, whose keys the grid must not have.

    Raises:
        InputError: there is no grid, or a key or value is missing or stands twice.
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
        try:
            known = [json.dumps(value, sort_keys=True) for value in values]
        except (TypeError, ValueError, RecursionError):  # !!binary, !!set, a list in itself
            raise InputError(f"{where}: expected numbers, text, lists or mappings") from None
        twice = next((value for value in known if known.count(value) > 1), None)
        if twice is not None:
            raise InputError(f"{where}: {twice} stands twice")
        grid[key] = values
    if not grid:
        raise InputError("--grid: expected at least one, e.g. training.learning_rate=1e-3,2e-3")
    return grid


def settings_of(
    name_or_path: str,
    grid: Mapping[str, Sequence[Any]],
    folder: Path,
    *,
    scale: str | None = None,
    overrides: Sequence[str] = (),
    seeds: list[int] | None = None,
) -> list[Setting]:
    """Every combination of the grid's values, the last key's changing fastest.

    Raises:
        InputError: a recipe that results is not valid.
    """
    settings = []
    for values in _combinations(grid):
        chosen = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        recipe = load_recipe(
            name_or_path, scale=scale, overrides=[*overrides, *chosen], seeds=seeds
        )
        settings.append(Setting(values, recipe, folder / _folder_name(values, recipe)))
    return settings


def _combinations(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    if not grid:
        yield {}
        return
    *before, (last, values) = grid.items()
    for point in _combinations(dict(before)):
        for value in values:
            yield {**point, last: value}


def _folder_name(values: Mapping[str, Any], recipe: Recipe) -> str:
    """Readable, and another one for any other recipe; seeds do not matter, more may come."""
    described = ",".join(f"{key.rpartition('.')[2]}={shown(v)}" for key, v in values.items())
    slug = re.sub(r"[^A-Za-z0-9.,=+-]+", "_", described)[:60].lstrip(".")
    same = dump_recipe(recipe.model_copy(update={"seeds": [0]}))
    return f"{slug}-{hashlib.sha256(same.encode()).hexdigest()[:8]}"


def shown(value: Any) -> str:
    """A grid's value for people: text without quotes, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def tasks_of(settings: Sequence[Setting]) -> list[Task]:
    """All tasks, setting by setting and seed by seed."""
    return [
        Task(setting, contender.name, seed)
        for setting in settings
        for seed in setting.recipe.seeds
        for contender in setting.recipe.contenders
    ]
