"""YAML as recipes want it: nothing is guessed, and a key that stands twice is an error.

A leaf module: it imports nothing of ours but other leaves. It differs from PyYAML's safe loader in
six ways: ``3e-4`` is a number (YAML 1.1 wants a dot and a sign, and reads a string otherwise), a
date stays a string, a repeated key is refused, and so are half of a surrogate pair, which no UTF-8
file can hold, a whole number of more than 256 bits, and a document that would be enormous once
every alias (``*name``) is replaced by what it stands for.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from contextlm.base.errors import InputError
from contextlm.base.visible import shown

_NUMBER = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
        |[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
# PyYAML lets these through for tags that do not fit their value (`!!int ""`, `!!bool maybe`), for
# dates and numbers out of range, and for documents nested deeper than Python's stack.
_MOST_NODES = 200_000  # values in a document, each alias counted as all that it stands for
_DEEPEST = 100  # brackets and braces inside one another
_LARGEST_INT = 2**256 - 1
_FAULTS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)


# PyYAML's words, and such as help who does not know its insides.
_CLEARER = {
    "could not determine a constructor for the tag": "only plain values are allowed, not the tag",
    "found unhashable key": "a key must be text, not a list or a mapping",
    "but found another document": "more than one document",
    "mapping values are not allowed here": (
        "a colon and a space may not stand here; a text that holds them needs quotes"
    ),
}


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

    def fetch_flow_collection_start(self, token: Any) -> None:
        # PyYAML's time grows with the square of the brackets that are open.
        if self.flow_level >= _DEEPEST:
            raise yaml.scanner.ScannerError(None, None, "nested too deeply", self.get_mark())
        super().fetch_flow_collection_start(token)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Checked before `<<` merges are applied: those may repeat a key, to override it.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {shown(key.value)} stands twice", key.start_mark
                )
            seen.add((key.tag, str(key.value)))
        return node

    def construct_document(self, node: Any) -> Any:
        # Before anything is built: `<<` merges and all that reads the values would write them out.
        if _unfolded(node, {}) > _MOST_NODES:
            raise yaml.constructor.ConstructorError(
                None, None, f"aliases make it more than {_MOST_NODES:,} values", node.start_mark
            )
        return super().construct_document(node)

    def construct_yaml_int(self, node: Any) -> int:
        text = str(node.value)
        try:
            # Python reads thousands of decimal digits slowly, and refuses to after 4,300.
            value = super().construct_yaml_int(node) if len(text) < 1000 else _LARGEST_INT + 1
        except (ValueError, IndexError):  # an explicit tag on what is no number
            raise yaml.constructor.ConstructorError(
                None, None, f"not a whole number: {shown(text)}", node.start_mark
            ) from None
        if abs(value) > _LARGEST_INT:
            raise yaml.constructor.ConstructorError(
                None, None, "a whole number of more than 256 bits", node.start_mark
            )
        return value

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise yaml.constructor.ConstructorError(
                None, None, "half of a surrogate pair is not text", node.start_mark
            )
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _unfolded(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node holds, each alias counted as all that it stands for.

    `known` keeps what was counted. A value that contains itself counts as one where it does: those
    who read it tell of it.
    """
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = 1
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    known[id(node)] = 1 + sum(_unfolded(part, known) for part in inner)
    return known[id(node)]


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
        problem = " ".join(error.problem.split())
        for theirs, ours in _CLEARER.items():
            problem = problem.replace(theirs, ours)
        return problem + place
    if isinstance(error, yaml.reader.ReaderError):
        return f"character #x{error.character:04x} is not allowed"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return " ".join(str(error).split()) or type(error).__name__
