"""YAML as recipes want it: no value is guessed, and a key that stands twice is an error.

What differs from PyYAML's safe loader: ``3e-4`` is a number (YAML 1.1 wants a dot and a sign, and
reads a text otherwise); numbers in other notations (``064``, ``0x10``, ``2:08``, ``1_000``) and
the booleans yes, no, on and off are errors, since YAML 1.1 and 1.2 read them differently; so are
what no UTF-8 file can hold and a path that a comment cuts off; a date stays text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from contextlm.base.errors import InputError
from contextlm.base.visible import shown

_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$")
_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9]+[eE][-+]?[0-9]+
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
# What YAML 1.1, YAML 1.2 or a person would take for three different things.
_OTHER_NUMBER = re.compile(
    r"""^[-+]?(?:0[0-9_]+|0[xX][0-9a-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+
        |[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?
        |(?=[0-9.]*_)[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?)$""",
    re.VERBOSE,
)
# An unquoted path may hold ` #`, where YAML ends the value.
_PATH = re.compile(r"^(?:text|jsonl):|/")
_OTHER_BOOL = re.compile(r"^(?:yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF)$")
# PyYAML lets these through for tags that do not fit their value (`!!int ""`, `!!bool maybe`), for
# numbers of thousands of digits, and for documents nested deeper than Python's stack.
_FAULTS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the differences that the module names."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Checked before `<<` merges are applied: those may repeat a key, to override it.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, value in node.value:
            _check_no_comment_cuts_off(value)
            if (key.tag, str(key.value)) in seen:
                raise _fault(f"key {shown(key.value)} stands twice", key)
            seen.add((key.tag, str(key.value)))
        return node

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise _fault("half of a surrogate pair is not text", node)
        return value

    def construct_other_number(self, node: Any) -> Any:
        example = node.value.lstrip("+-0").replace("_", "")
        hint = f" such as {example}" if example.isdecimal() else ""
        raise _fault(
            f"{shown(node.value)} could be read as several numbers: write a decimal number{hint}, "
            "or put it in quotes if it is text",
            node,
        )

    def construct_other_bool(self, node: Any) -> Any:
        raise _fault(
            f"{shown(node.value)}: write true or false, or put it in quotes if it is text", node
        )


for _name, _pattern, _first in (
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("other-number", _OTHER_NUMBER, "-+0123456789"),
    ("bool", _BOOL, "tTfF"),
    ("other-bool", _OTHER_BOOL, "yYnNoO"),
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("merge", re.compile(r"^<<$"), "<"),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", _pattern, list(_first))
_Loader.add_constructor(f"{_TAG}other-number", _Loader.construct_other_number)
_Loader.add_constructor(f"{_TAG}other-bool", _Loader.construct_other_bool)


def _check_no_comment_cuts_off(node: yaml.Node) -> None:
    if isinstance(node, yaml.ScalarNode) and node.style is None and _PATH.search(node.value):
        mark = node.end_mark
        rest = str(mark.buffer)[mark.pointer :].split("\n", 1)[0].strip()
        if rest.startswith("#"):
            raise _fault(
                f"a comment follows the path {shown(node.value)}: put the path in quotes, or the "
                "comment on a line of its own",
                node,
            )


def _fault(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


class _Dumper(yaml.SafeDumper):
    """Quotes every string that this module's loader, or any other, would take for a number."""

    yaml_implicit_resolvers = {
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
            *_Loader.yaml_implicit_resolvers.get(first, []),
        ]
        for first in {**yaml.SafeDumper.yaml_implicit_resolvers, **_Loader.yaml_implicit_resolvers}
    }

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Unicode's own line breaks come back changed unless they are escaped.
        style = '"' if set(data) & set("\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


def dump(value: Any) -> str:
    """`value` (mappings, lists, text, numbers, null) as YAML that `parse` reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def parse(text: str, where: str, *, comments: bool = True) -> Any:
    """The value that YAML `text` stands for.

    Args:
        text: YAML.
        where: opens the message of an error.
        comments: whether ``#`` may begin one; else it is a character as any other.

    Raises:
        InputError: the text is not YAML, or a key stands twice in one mapping.
    """
    stand_in = next(c for c in map(chr, range(0xE000, 0xF8FF)) if c not in text)  # private use
    try:
        # _Loader derives from the safe loader: it builds plain values only, whatever the tags say.
        if comments:
            return yaml.load(text, Loader=_Loader)
        return _replaced(yaml.load(text.replace("#", stand_in), Loader=_Loader), stand_in, "#")
    except _FAULTS as error:
        raise InputError(f"{where}: not valid YAML: {_reason(error)}") from None


def _replaced(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {_replaced(k, old, new): _replaced(v, old, new) for k, v in value.items()}
    if isinstance(value, list):
        return [_replaced(item, old, new) for item in value]
    return value.replace(old, new) if isinstance(value, str) else value


def _reason(error: Exception) -> str:
    """What is wrong and where, on one line, without PyYAML's name of the source and its caret."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem:
        mark = error.problem_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        return " ".join(error.problem.split()) + place
    if isinstance(error, yaml.reader.ReaderError):
        return f"character #x{error.character:04x} is not allowed"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return " ".join(str(error).split()) or type(error).__name__
