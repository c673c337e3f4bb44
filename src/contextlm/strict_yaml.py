"""YAML as recipes want it: nothing is guessed, and a key that stands twice is an error.

A leaf module: it imports nothing of ours but the errors. It differs from PyYAML's safe loader in
four ways: ``3e-4`` is a number (YAML 1.1 wants a dot and a sign, and reads a string otherwise), a
date stays a string, a repeated key is refused, and so is half of a surrogate pair, which no UTF-8
file can hold.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from contextlm.errors import InputError

_NUMBER = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
        |[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
# PyYAML lets these through for tags that do not fit their value (`!!int ""`, `!!bool maybe`), for
# dates and numbers out of range, and for documents nested deeper than Python's stack.
_FAULTS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the differences that the module names."""

    yaml_implicit_resolvers = {
        first: [
            (tag, _NUMBER if tag.endswith(":float") else pattern)
            for tag, pattern in resolvers
            if not tag.endswith(":timestamp")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Checked before `<<` merges are applied: those may repeat a key, to override it.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} stands twice", key.start_mark
                )
            seen.add((key.tag, str(key.value)))
        return node

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise yaml.constructor.ConstructorError(
                None, None, "half of a surrogate pair is not text", node.start_mark
            )
        return value


class _Dumper(yaml.SafeDumper):
    """Quotes every string that this module's loader, or any other, would take for a number."""

    yaml_implicit_resolvers = {
        first: resolvers + _Loader.yaml_implicit_resolvers[first]
        for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Unicode's own line breaks come back changed unless they are escaped.
        style = '"' if set(data) & set("\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


def dump(value: Any) -> str:
    """`value` (mappings, lists, text, numbers, null) as YAML that `parse` reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def parse(text: str, where: str) -> Any:
    """The value that YAML `text` stands for; `where` opens the message of an error.

    Raises:
        InputError: the text is not YAML, or a key stands twice in one mapping.
    """
    try:
        # _Loader derives from the safe loader: it builds plain values only, whatever the tags say.
        return yaml.load(text, Loader=_Loader)
    except _FAULTS as error:
        raise InputError(f"{where}: not valid YAML: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """What is wrong and where, on one line, without PyYAML's name of the source and its caret."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem:
        mark = error.problem_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        return " ".join(error.problem.split()) + place
    if isinstance(error, yaml.reader.ReaderError):
        return f"character #x{error.character:04x} is not allowed"
    return " ".join(str(error).split()) or type(error).__name__
