"""Merging a recipe's scales and overrides, before anything in it is checked.

In a scale and in ``--set`` the contenders are addressed by name, as if ``contenders`` were a
mapping; ``null`` in place of a contender leaves it out. A leaf module: it works on plain
dictionaries and knows nothing of the recipe's fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from contextlm.base.errors import InputError, unknown_name
from contextlm.base.strict_yaml import parse
from contextlm.base.visible import shown

FULL = "full"


def resolve(
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
    named = scales_of(raw, where)
    raw.pop("scales", None)
    if scale != FULL and scale not in named:
        raise unknown_name(f"scale of {where}:", scale, [*named, FULL])
    contenders = _by_name(raw.get("contenders"), where)
    raw["contenders"] = contenders
    layer = {} if scale == FULL else mapping(named[scale], f"{where}: scale {scale!r}")
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


def mapping(value: Any, where: str) -> dict[str, Any]:
    """`value` itself if it is a mapping with names as keys, otherwise an `InputError`."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{where}: expected a mapping from names to values")
    return value


def scales_of(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The recipe's own scales, each not yet checked; an `InputError` if they are no mapping."""
    scales = raw.get("scales")
    scales = mapping({} if scales is None else scales, f"{where}: scales")
    if FULL in scales:
        raise InputError(f"{where}: scales: {FULL!r} is the recipe's top level")
    return scales


def _by_name(contenders: Any, where: str) -> dict[str, Any]:
    if not isinstance(contenders, list) or not contenders:
        raise InputError(f"{where}: 'contenders' must be a list with at least one entry")
    named: dict[str, Any] = {}
    for number, entry in enumerate(contenders, start=1):
        name = mapping(entry, f"{where}: contenders: entry {number}").get("name")
        if not isinstance(name, str):
            raise InputError(f"{where}: contenders: entry {number} needs a 'name' in letters")
        if name in named:
            raise InputError(f"{where}: contenders: {name!r} is named twice")
        named[name] = entry
    return named


def _as_list(contenders: Any, known: list[str], where: str) -> list[dict[str, Any]]:
    """The contenders as a list again, without those that are null now.

    A name not `known` is a new contender if it brings a model with a type, otherwise a slip.
    """
    entries = []
    for name, entry in mapping(contenders, f"{where}: contenders, by name").items():
        if entry is None and name in known:
            continue
        model = entry.get("model") if isinstance(entry, dict) else None
        if name not in known and not (isinstance(model, dict) and "type" in model):
            raise unknown_name(f"contender of {where}:", name, known)
        entries.append({"name": name, **mapping(entry, f"{where}: contenders.{name}")})
    return entries


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins; mappings merge deeply, anything else replaces."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def departures(
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


def own_setting(raw: Mapping[str, Any], where: str, scale: str) -> str:
    """The scale whose setting reported figures belong to: `scale` if it brings such, else full."""
    layer = scales_of(dict(raw), where).get(scale)
    contenders = layer.get("contenders") if isinstance(layer, dict) else None
    entries = contenders.values() if isinstance(contenders, dict) else ()
    return scale if any(isinstance(e, dict) and "reported" in e for e in entries) else FULL


# Keys of a recipe and of a contender.
_NO_DEPARTURE = {"contenders", "document", "evaluation", "name", "question", "scale", "seeds"}
_NO_DEPARTURE |= {"baseline", "reported", "reported_epochs"}


def _differences(full: Mapping[str, Any], changed: Mapping[str, Any], above: str) -> list[str]:
    keys: list[str] = []
    for key in sorted({*full, *changed} - _NO_DEPARTURE):
        mine, theirs = full.get(key), changed.get(key)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            keys += _differences(mine, theirs, f"{above}{key}.")
        elif mine != theirs:
            keys.append(f"{above}{key}")
    return keys


def sets(key: str, overrides: Iterable[str]) -> bool:
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
    parsed = parse(value, f"--set {shown(text)}")
    for part in reversed(parts):
        parsed = {part: parsed}
    return dict(parsed)
