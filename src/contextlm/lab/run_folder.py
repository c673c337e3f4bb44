"""A run's folder: made whole, held by one process, and known as unfinished until all is done.

While a run is at work, its folder holds `_working` (no contender can be named so): what a killed
process resumes from, the lock, and `run.json`, whose presence marks the run as unfinished.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contextlm.base.errors import InputError
from contextlm.base.files import remove_parts, umask, write_json, write_text
from contextlm.base.locks import locked
from contextlm.lab.jobs import WORKING, Planner, differing_keys, write_job
from contextlm.recipe.loading import dump_recipe, load_recipe
from contextlm.recipe.schema import Recipe

POINTS = "points.json"  # in a grid's folder
_STATE = "run.json"
_LOCK = "lock"
_NUMBERED = re.compile(r".+-\d{3,}")


def is_unfinished(run: Path) -> bool:
    """Whether a folder is that of a run that has begun and is not finished."""
    return (run / WORKING / _STATE).is_file()


def write_run(folder: Path, planner: Planner, environment: dict[str, Any]) -> None:
    """Put a run's first files into a folder: its recipe, environment, and all its jobs."""
    write_text(folder / "recipe.yaml", dump_recipe(planner.prepared.recipe))
    write_json(folder / "environment.json", environment)
    for job in planner.jobs:
        write_job(folder, job)
    mark_unfinished(folder)


def mark_unfinished(run: Path) -> None:
    """Note that there is something left to do."""
    write_json(run / WORKING / _STATE, {"version": 2})


def finish(run: Path) -> None:
    """Mark a run as finished and remove what it might have resumed from."""
    (run / WORKING / _STATE).unlink(missing_ok=True)
    shutil.rmtree(run / WORKING, ignore_errors=True)


def new_folder(out: Path, name: str, fill: Callable[[Path], None]) -> Path:
    """Make the next free folder ``NAME-001`` below `out`; it appears with what `fill` puts into it.

    So a killed process leaves a folder that can be resumed, or none.
    """
    out.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=out, prefix=f".{name}.", suffix=".part"))
    try:
        partial.chmod(0o777 & ~umask())
        fill(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    number = 1
    while True:  # the rename decides when two runs start at once
        folder = out / f"{name}-{number:03d}"
        try:
            if not folder.exists():
                partial.rename(folder)
                return folder
        except OSError:
            if not folder.exists():  # it was not the name
                raise
        number += 1


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Hold the lock of a run for the time of the block.

    Raises:
        InputError: another process is at work on it.
    """
    (run / WORKING).mkdir(exist_ok=True)
    with locked(run / WORKING / _LOCK, str(run)):
        remove_parts(run)
        try:
            yield
        finally:
            if not is_unfinished(run):
                shutil.rmtree(run / WORKING, ignore_errors=True)


def points_of(folder: Path) -> list[Path]:
    """The run folders of a grid's folder; none where it is not one."""
    if not (folder / POINTS).is_file():
        return []
    return sorted(path.parent for path in folder.glob("*/recipe.yaml"))


def unfinished_below(out: Path) -> list[Path]:
    """The unfinished runs and grids below `out`, the one that began last first."""
    if not out.is_dir():
        return []
    began = {}
    for folder in out.iterdir():
        runs = points_of(folder) or [folder]
        if _NUMBERED.fullmatch(folder.name) and any(map(is_unfinished, runs)):
            began[folder] = max((run / "recipe.yaml").stat().st_mtime_ns for run in runs)
    return sorted(began, key=lambda folder: began[folder], reverse=True)


def newest_unfinished(out: Path) -> Path:
    """The unfinished run or grid below `out` that began last.

    Raises:
        InputError: there is none.
    """
    found = unfinished_below(out)
    if not found:
        raise InputError(f"--resume: there is no unfinished run below {out}")
    return found[0]


def unfinished_run_of(recipes: Sequence[Recipe], out: Path, name: str) -> Path | None:
    """The unfinished run, or grid, of these recipes that began last; None if there is none.

    Args:
        recipes: one for a run, those of all points for a grid.
        out: where run folders are.
        name: that its folder has before the number.

    Raises:
        InputError: there are unfinished ones of this name, but all of other recipes; the message
            names the keys that differ.
    """
    differing = None
    wanted = {str(_plain(recipe)) for recipe in recipes}
    for folder in unfinished_below(out):
        if not re.fullmatch(rf"{re.escape(name)}-\d+", folder.name):
            continue
        runs = points_of(folder) or [folder]
        known = [load_recipe(str(run / "recipe.yaml")) for run in runs]
        if {str(_plain(recipe)) for recipe in known} == wanted:
            return folder
        keys = [
            key
            for one, other in zip(known, recipes, strict=False)
            for key in differing_keys(_plain(one), _plain(other))
        ]
        differing = differing or (folder, ", ".join(dict.fromkeys(keys)) or "the grid")
    if differing is None:
        return None
    folder, what = differing
    raise InputError(
        f"--resume: the recipe is not that of the unfinished {folder}: {what} differs (leave out "
        f"--resume to begin a new run, or `contextlm run --resume {folder}` to resume that one)"
    )


def _plain(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude={"written", "departs_from_full"})
