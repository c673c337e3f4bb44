"""A run folder's files, read as what a stranger may have made.

Nothing leads out of the folder, nothing is executed, and whatever the report relies on is checked
here: names, seeds, and how large a file may be.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from contextlm.base.errors import InputError
from contextlm.base.strict_yaml import parse
from contextlm.base.visible import shown

_MOST_BYTES = 64 * 1024**2  # of a file that is read whole; a run writes kilobytes


class _Loose(BaseModel):
    """What a resolved recipe must hold to be reported; later and earlier versions hold more."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _PhaseOne(_Loose):
    stop_at: float = Field(0.9, gt=0, le=1)
    max_iterations: int = Field(1, ge=1, le=1_000_000_000)


class _Contender(_Loose):
    # The name is a folder's name: it must not lead anywhere else.
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)
    phase1: _PhaseOne | None = None


class _Resolved(_Loose):
    contenders: list[_Contender] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field([0], min_length=1)
    budgets: list[Annotated[float, Field(gt=0)]] | None = None
    departs_from_full: list[str] | None = None

    @model_validator(mode="after")
    def _nothing_twice(self) -> Self:
        names = [contender.name for contender in self.contenders]
        if len(set(names)) < len(names) or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a contender or a seed stands twice")
        return self


def read_recipe(run: Path) -> dict[str, Any]:
    """The resolved recipe of a run folder: contenders with names, and seeds, are in it.

    Raises:
        InputError: it is missing, damaged, or no resolved recipe; the message names it.
    """
    file = run / "recipe.yaml"
    recipe = parse(read_text(run, file), str(file))
    if not isinstance(recipe, dict) or not isinstance(recipe.get("contenders"), list):
        raise InputError(f"{file}: not a resolved recipe")
    try:
        _Resolved.model_validate(recipe)
    except ValidationError as error:
        raise InputError(f"{file}: {first_problem(error)}") from None
    return recipe


def read_mapping(run: Path, file: Path) -> dict[str, Any]:
    """A JSON object of a run folder.

    Raises:
        InputError: it is missing, damaged, or something else; the message names it.
    """
    try:
        value = json.loads(read_text(run, file))
    except (ValueError, RecursionError):
        raise InputError(f"{file}: not valid JSON") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: not a mapping")
    return value


def read_text(run: Path, file: Path) -> str:
    """The UTF-8 text of a file that lies, links resolved, in the folder `run`.

    Raises:
        InputError: it is missing, no regular file, too large, not text, or lies elsewhere.
    """
    check_inside(run, file)
    try:
        if file.exists() and not file.is_file():  # reading a pipe would never end
            raise InputError(f"{file}: not a file")
        if file.stat().st_size > _MOST_BYTES:
            raise InputError(f"{file}: larger than {_MOST_BYTES // 1024**2} MB, no run writes such")
        return file.read_text("utf-8")
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{file}: not UTF-8 text") from None


def check_inside(run: Path, file: Path) -> None:
    """An `InputError` if a link leads from inside the folder `run` to somewhere else."""
    try:
        inside = file.resolve().is_relative_to(run.resolve())
    except (OSError, RuntimeError):  # links in a circle
        inside = False
    if not inside:
        raise InputError(f"{file}: leads out of the run folder")


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong with a record: its key and what is wrong there."""
    problem = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in problem["loc"])
    if key == "version":
        return f"version {shown(problem['input'])} is not one that this contextlm reads"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "json_invalid":
        return f"not valid JSON: {message.removeprefix('Invalid JSON: ')}"
    if problem["type"] in {"model_type", "dict_type"}:
        message = "expected a mapping"
    message = message[:1].lower() + message[1:].replace(" after validation", "")
    value = problem["input"]
    given = f", got {shown(value)}" if isinstance(value, (str, int, float, bool)) else ""
    return f"{key}: {message}{given}" if key else message
