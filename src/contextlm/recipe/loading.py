"""Recipes from YAML: the top level, then a scale, then each ``--set key=value``, and then checked.

A recipe's top level is the scale ``full``; an entry of ``scales`` is merged over it, then each
override. In a scale and in an override the contenders are addressed by name, as if ``contenders``
were a mapping; ``null`` in place of a contender leaves it out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from contextlm.base.errors import InputError, unknown_name
from contextlm.base.files import is_file, is_folder, nearest_file, with_home
from contextlm.base.strict_yaml import dump, parse
from contextlm.base.visible import shown
from contextlm.recipe.problems import first_problem
from contextlm.recipe.schema import FULL, Recipe, merge, tuned_away

_SUFFIXES = {".yaml", ".yml"}


def builtin_recipes() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    folder = resources.files("contextlm") / "recipes"
    return sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".yaml"))


def recipe_scales(name_or_path: str) -> list[str]:
    """The scales of a recipe in its own order, ``full`` last.

    Raises:
        InputError: unknown name, malformed YAML, or `scales` is not a mapping.
    """
    raw, where = _read(name_or_path)
    return [*_scales_of(raw, where), FULL]


def load_recipe(
    name_or_path: str,
    *,
    scale: str | None = None,
    overrides: Sequence[str] = (),
    seeds: list[int] | None = None,
) -> Recipe:
    """Read, merge and check a recipe.

    Args:
        name_or_path: a built-in name, or the path of a YAML file.
        scale: ``full`` (the default) or one of the recipe's scales.
        overrides: ``dotted.key=value`` strings; the value is YAML.
        seeds: replace the recipe's seeds.

    Raises:
        InputError: unknown name, scale or key, malformed YAML, or a value that does not fit.
    """
    raw, where = _read(name_or_path)
    origin = raw.pop("resolved_from", FULL)
    departed = raw.pop("departs_from_full", [] if origin == FULL else None)
    scale = FULL if scale in (None, origin) else scale
    try:
        full = _resolve(dict(raw), where, _own_setting(raw, where, scale), ())
        raw = _resolve(raw, where, scale, overrides)
    except RecursionError:  # YAML aliases can make a value contain itself
        raise InputError(f"{where}: nested too deeply") from None
    if raw["scale"] == FULL:
        raw["scale"] = origin
    if seeds is not None:
        raw["seeds"] = seeds
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        names = [str(contender["name"]) for contender in raw["contenders"]]
        raise InputError(f"{where}: {first_problem(error, Recipe, names=names)}") from None
    if recipe.tuning is not None and _sets("training.learning_rate", overrides):
        raise InputError(f"{where}: {tuned_away('training.learning_rate')}")
    departs = _departures(full, raw, departed, where)
    return _with_absolute_paths(recipe, full).model_copy(update={"departs_from_full": departs})


def check_recipe(raw: dict[str, Any]) -> Recipe:
    """A recipe that a command has put together, resolved already, its paths made absolute.

    Raises:
        InputError: a value does not fit.
    """
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        names = [str(contender["name"]) for contender in raw["contenders"]]
        raise InputError(first_problem(error, Recipe, names=names)) from None
    return _with_absolute_paths(recipe, raw)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML. Loading it gives the same recipe.

    Its values are its top level; ``resolved_from`` and ``departs_from_full`` keep what it was made
    from, so that a report of a second run does not pass another setting off as the document's.
    """
    data = recipe.model_dump(mode="json", exclude={"scale"})
    return dump({"resolved_from": recipe.scale, **data})


def _with_absolute_paths(recipe: Recipe, full: Mapping[str, Any]) -> Recipe:
    """The recipe as it means the same in another folder and in another process.

    What was written is kept in `Recipe.written`, by dotted key; what an earlier dump noted there
    stays as long as its value does.

    Args:
        recipe: checked.
        full: the recipe as read, without overrides.
    """
    values = {"corpus": recipe.corpus, "tokenizer": recipe.tokenizer}
    if isinstance(recipe.validation, str):
        values["validation"] = recipe.validation
    if recipe.embedding.source == "pretrained":
        values["embedding.path"] = recipe.embedding.path
    trained = {f"contenders.{each.name}.from": each.from_ for each in recipe.contenders}
    values |= {key: value for key, value in trained.items() if value is not None}
    absolute = {key: _absolute(key, value) for key, value in values.items()}
    written = {key: value for key, value in values.items() if absolute[key] != value}
    embedding = full.get("embedding")
    read = {**full, "embedding.path": embedding.get("path") if isinstance(embedding, dict) else ""}
    read |= {f"contenders.{each['name']}.from": each.get("from") for each in full["contenders"]}
    for key, value in recipe.written.items():
        if values.get(key) == absolute.get(key) == read.get(key) is not None:
            written[key] = value
    path = absolute.pop("embedding.path", recipe.embedding.path)
    contenders = [
        each.model_copy(update={"from_": absolute.pop(f"contenders.{each.name}.from", None)})
        for each in recipe.contenders
    ]
    embedding_settings = recipe.embedding.model_copy(update={"path": path})
    return recipe.model_copy(
        update={
            **absolute,
            "embedding": embedding_settings,
            "contenders": contenders,
            "written": written,
        }
    )


def _absolute(key: str, value: str) -> str:
    """`value` with its path made absolute, where it is one and not a name."""
    if key in ("corpus", "validation"):
        kind, _, path = value.partition(":")
        if kind in ("text", "jsonl") and path:
            return f"{kind}:{with_home(path, f'{key} {value!r}').absolute()}"
    elif key != "tokenizer" or value not in ("gpt2", "pythia"):  # no folder stands in for these
        with suppress(RuntimeError):  # a home that nobody has
            folder = Path(value).expanduser()
            return str(folder.absolute()) if is_folder(folder) else value
    return value


def _read(name_or_path: str) -> tuple[dict[str, Any], str]:
    path = Path(name_or_path)
    if name_or_path in builtin_recipes():
        file = resources.files("contextlm") / "recipes" / f"{name_or_path}.yaml"
        text = file.read_text("utf-8")
        where = f"recipe {name_or_path!r}"
    elif path.suffix in _SUFFIXES or is_file(path) or is_folder(path):
        where = str(path)
        try:
            text = path.read_text("utf-8-sig")
        except FileNotFoundError:
            raise InputError(f"{where}: no such file{nearest_file(path, _SUFFIXES)}") from None
        except IsADirectoryError:
            raise InputError(f"{where}: is a folder, not a recipe") from None
        except OSError as error:
            raise InputError(f"{where}: cannot read the recipe: {error.strerror}") from None
        except ValueError:  # also a name that no file can have
            raise InputError(f"{where}: the recipe is not UTF-8 text") from None
    else:
        raise unknown_name("recipe", name_or_path, builtin_recipes())
    raw = dict(_mapping(parse(text, where), where))
    if "scale" in raw:
        raise InputError(f"{where}: 'scale' cannot be set: choose one with --scale")
    return raw, where


# --- merging --------------------------------------------------------------------------------------


def _resolve(
    raw: dict[str, Any], where: str, scale: str, overrides: Iterable[str]
) -> dict[str, Any]:
    """The recipe with its scale and then the overrides merged over it, its values not yet checked.

    Args:
        raw: the recipe as read, contenders as a list.
        where: opens the message of an error.
        scale: the scale to take.
        overrides: ``dotted.key=value`` strings; the value is YAML.

    Raises:
        InputError: the scale or a contender is unknown, or something is no mapping that must be.
        RecursionError: a value contains itself.
    """
    named = _scales_of(raw, where)
    raw.pop("scales", None)
    if scale != FULL and scale not in named:
        raise unknown_name(f"scale of {where}:", scale, [*named, FULL])
    contenders = _by_name(raw.get("contenders"), where)
    raw["contenders"] = contenders
    layer = {} if scale == FULL else _mapping(named[scale], f"{where}: scale {scale!r}")
    raw = _merged(raw, layer, where)
    brought = [entry["name"] for entry in _as_list(raw["contenders"], list(contenders), where)]
    for override in overrides:
        raw = _merged(raw, _parse_override(override), where)
    raw["contenders"] = _as_list(raw["contenders"], [*contenders, *brought], where)
    raw["scale"] = scale
    return raw


def _merged(raw: dict[str, Any], layer: dict[str, Any], where: str) -> dict[str, Any]:
    if "scale" in layer:
        raise InputError(f"{where}: 'scale' cannot be set: choose one with --scale")
    return merge(raw, layer)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    """`value` itself if it is a mapping with names as keys, otherwise an `InputError`."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{where}: expected a mapping from names to values")
    return value


def _scales_of(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The recipe's own scales, each not yet checked; an `InputError` if they are no mapping."""
    scales = raw.get("scales")
    scales = _mapping({} if scales is None else scales, f"{where}: scales")
    if FULL in scales:
        raise InputError(f"{where}: scales: {FULL!r} is the recipe's top level")
    return scales


def _by_name(contenders: Any, where: str) -> dict[str, Any]:
    if not isinstance(contenders, list) or not contenders:
        raise InputError(f"{where}: 'contenders' must be a list with at least one entry")
    named: dict[str, Any] = {}
    for number, entry in enumerate(contenders, start=1):
        name = _mapping(entry, f"{where}: contenders: entry {number}").get("name")
        if not isinstance(name, str):
            raise InputError(f"{where}: contenders: entry {number} needs a 'name' in letters")
        if name in named:
            raise InputError(f"{where}: contenders: {name!r} is named twice")
        named[name] = entry
    return named


def _as_list(contenders: Any, known: list[str], where: str) -> list[dict[str, Any]]:
    """The contenders as a list again, without those that are null now.

    A name not `known` is a new contender if it brings a model with a type, or one from somewhere;
    otherwise it is a slip.
    """
    entries = []
    for name, entry in _mapping(contenders, f"{where}: contenders, by name").items():
        if entry is None and name in known:
            continue
        model = entry.get("model") if isinstance(entry, dict) else None
        whole = isinstance(model, dict) and "type" in model
        whole = whole or (isinstance(entry, dict) and "from" in entry)
        if name not in known and not whole:
            raise unknown_name(f"contender of {where}:", name, known)
        entries.append({"name": name, **_mapping(entry, f"{where}: contenders.{name}")})
    return entries


def _departures(
    full: Mapping[str, Any], changed: Mapping[str, Any], noted: Any, where: str
) -> list[str] | None:
    """Dotted keys in which a resolved recipe differs from its top level, if results can differ too.

    Contenders that only one of them has do not count, nor does what is measured afterwards.

    Args:
        full: the recipe resolved without scale and overrides.
        changed: the same recipe resolved with them.
        noted: keys of an earlier departure, from which `full` itself comes; None: not known.
        where: opens the message of an error.

    Returns:
        The keys of both, sorted, or None where the earlier ones are not known.

    Raises:
        InputError: `noted` is no list of names.
    """
    if noted is None:
        return None
    if not isinstance(noted, list) or not all(isinstance(key, str) for key in noted):
        raise InputError(f"{where}: departs_from_full: expected a list of keys")
    mine, theirs = ({c["name"]: c for c in recipe["contenders"]} for recipe in (full, changed))
    keys = _differences(full, changed, "")
    for name in mine:
        if name in theirs:
            keys += _differences(mine[name], theirs[name], f"contenders.{name}.")
    return sorted({*noted, *keys})


def _own_setting(raw: Mapping[str, Any], where: str, scale: str) -> str:
    """The scale whose setting reported figures belong to: `scale` if it brings such, else full."""
    layer = _scales_of(dict(raw), where).get(scale)
    contenders = layer.get("contenders") if isinstance(layer, dict) else None
    entries = contenders.values() if isinstance(contenders, dict) else ()
    return scale if any(isinstance(e, dict) and "reported" in e for e in entries) else FULL


# Keys of a recipe and of a contender.
_NO_DEPARTURE = {"contenders", "document", "evaluation", "name", "question", "scale", "seeds"}
_NO_DEPARTURE |= {"baseline", "reported", "reported_epochs", "written"}


def _differences(full: Mapping[str, Any], changed: Mapping[str, Any], above: str) -> list[str]:
    keys: list[str] = []
    for key in sorted({*full, *changed} - _NO_DEPARTURE):
        mine, theirs = full.get(key), changed.get(key)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            keys += _differences(mine, theirs, f"{above}{key}.")
        elif mine != theirs:
            keys.append(f"{above}{key}")
    return keys


def _sets(key: str, overrides: Iterable[str]) -> bool:
    """Whether one of the ``dotted.key=value`` strings gives this dotted key a value."""
    for override in overrides:
        value: Any = _parse_override(override)
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            return True
    return False


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise InputError(
            f"--set {shown(text)}: expected key=value, e.g. training.learning_rate=3e-4"
        )
    parsed = parse(value, f"--set {shown(text)}", comments=False)
    for part in reversed(parts):
        parsed = {part: parsed}
    return dict(parsed)
