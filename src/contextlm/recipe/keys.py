"""Every key that a recipe may have, read off the schema: its type, default and meaning."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from contextlm.recipe.schema import Recipe

# Written by contextlm into a resolved recipe, not by people.
_NOTES = {"scale", "departs_from_full", "written"}
_WORDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true | false",
    "object": "mapping",
    "null": "null",
}
_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
_MOST = 1_000_000  # bounds beyond are there to refuse nonsense


@dataclass(frozen=True)
class Key:
    """One key. `default` is JSON; empty where there is none, for the key is required or a group."""

    name: str
    type: str
    default: str
    meaning: str


def recipe_keys() -> list[Key]:
    """All of them in the schema's order, groups before what is in them.

    ``contenders.NAME`` is one contender, ``parameter_groups.N`` one group of the list.
    """
    schema = Recipe.model_json_schema()
    return list(_keys(schema, schema["$defs"], ""))


def _keys(schema: Mapping[str, Any], known: Mapping[str, Any], above: str) -> Iterator[Key]:
    for name, field in schema["properties"].items():
        if above + name in _NOTES:
            continue
        group = _group(field, known)
        default = _default(field, schema, name)
        if group is not None and field.get("default") is not None:
            default = ""  # it is that of its keys
        meaning = field.get("description") or (group or {}).get("description", "")
        yield Key(above + name, _type(field), default, " ".join(meaning.split()))
        if group is not None:
            one = "" if "items" not in str(field) else "NAME." if name == "contenders" else "N."
            yield from _keys(group, known, f"{above}{name}.{one}")


def _group(field: Mapping[str, Any], known: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The settings that a field holds, one or a list of them."""
    for part in (field, field.get("items", {}), *field.get("anyOf", ())):
        if "$ref" in part:
            found: Mapping[str, Any] = known[part["$ref"].rpartition("/")[2]]
            return found
    return None


def _default(field: Mapping[str, Any], schema: Mapping[str, Any], name: str) -> str:
    if name in schema.get("required", ()):
        return "required"
    return json.dumps(field["default"]) if "default" in field else ""


def _type(field: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " | ".join(map(_type, field["anyOf"]))
    if "const" in field or "enum" in field:
        return " | ".join(map(str, field.get("enum", [field.get("const")])))
    if field.get("type") == "array":
        if "prefixItems" in field:
            return f"list of {len(field['prefixItems'])} {_plural(field['prefixItems'][0])}"
        return f"list of {_plural(field['items'])}"
    bounds = [
        f"{sign} {field[key]:g}"
        for key, sign in _BOUNDS.items()
        if abs(field.get(key, _MOST)) < _MOST
    ]
    return " ".join([_WORDS[field.get("type", "object")], *bounds])


def _plural(item: Mapping[str, Any]) -> str:
    kind, space, bounds = _type(item).partition(" >")
    return f"{kind.replace(' | ', 's | ')}s{space}{bounds}".replace("texts", "text")
