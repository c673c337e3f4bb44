"""What is wrong with a recipe, in one line: the dotted key, the fault, the nearest right key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from contextlm.base.errors import unknown_name
from contextlm.base.visible import shown
from contextlm.recipe.settings import (
    EvaluationSettings,
    PhaseOneSettings,
    Settings,
    TrainingSettings,
)


def first_problem(
    error: ValidationError,
    root: type[Settings],
    above: Sequence[str] = (),
    names: Sequence[str] = (),
) -> str:
    """One line for the first problem: the dotted key, what is wrong, the nearest known key.

    Args:
        error: what pydantic found.
        root: the settings that were validated.
        above: the keys that lead to `root`.
        names: the contenders' names, which stand for their places in the list.
    """
    problem = error.errors(include_url=False)[0]
    location = [str(part) for part in problem["loc"]]
    if problem["type"] == "finite_number" and location[-1] == "float":
        location.pop()  # of JSON's types, the one that was tried
    known = _fields_at(root, location[:-1])
    if len(location) > 1 and location[0] == "contenders" and location[1].isdecimal():
        location[1] = names[int(location[1])]
    key = ".".join([*above, *location])
    if problem["type"] == "extra_forbidden":
        siblings = [".".join([*above, *location[:-1], k]) for k in known]
        return _unknown_key(key, siblings)
    value = problem.get("input")
    if key == "corpus" and isinstance(value, dict) and list(value) in (["text"], ["jsonl"]):
        kind, path = next(iter(value.items()))  # YAML's reading of `text:` and of `text: PATH`
        slip = "PATH is missing" if path is None else "no space may follow the colon"
        return f"corpus: expected {kind}:PATH, {slip}"
    given = f", got {shown(value)}" if isinstance(value, (str, int, float, bool)) else ""
    return (f"{key}: " if key else "") + _message(problem) + given


def _message(problem: ErrorDetails) -> str:
    """What is wrong, without Python's words for it."""
    if problem["type"] in {"model_type", "dict_type"}:
        return "expected a mapping"
    if problem["type"] == "string_pattern_mismatch":
        dot = ", '.'" if "." in problem["ctx"]["pattern"] else ""
        return f"only letters, digits{dot}, '-' and '_' are allowed, a letter or digit first"
    if problem["type"] == "value_error":
        return problem["msg"].removeprefix("Value error, ")
    return problem["msg"][:1].lower() + problem["msg"][1:].replace(" after validation", "")


def _unknown_key(key: str, siblings: list[str]) -> str:
    """Names the nearest key: of its own place, or one of that very name in another place."""
    last = key.rpartition(".")[2]
    top, _, rest = key.partition(".")
    name = rest.partition(".")[0] if top == "contenders" else "NAME"
    places: dict[str, type[Settings]] = {
        "training": TrainingSettings,
        "evaluation": EvaluationSettings,
        f"contenders.{name}.phase1": PhaseOneSettings,
    }
    if top == "contenders":
        places = {f"contenders.{name}.training": TrainingSettings, **places}
    found = [f"{place}.{last}" for place, kind in places.items() if last in kind.model_fields]
    if found:
        return f"unknown key {key!r} (did you mean {found[0]!r}?)"
    return str(unknown_name("key", key, siblings))


def _fields_at(root: type[Settings], location: list[str]) -> list[str]:
    """Field names of the settings class that a pydantic error location points into."""
    current = root
    for part in location:
        field = current.model_fields.get(part)
        if field is None:
            continue  # a list index
        for candidate in _settings_in(field.annotation):
            current = candidate
    return [field.alias or name for name, field in current.model_fields.items()]


def _settings_in(annotation: Any) -> list[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [s for arg in getattr(annotation, "__args__", ()) for s in _settings_in(arg)]
