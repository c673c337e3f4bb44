"""The language of a report: English stands in the code, the others in one table each.

``languages/ja.yaml`` maps each English text to its Japanese. Names in braces are filled in after
the translation, so a sentence may put them in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from contextlm.base.errors import InputError
from contextlm.base.visible import shown

ENGLISH = "en"
_spoken: ContextVar[str] = ContextVar("language", default=ENGLISH)


@cache
def translations(language: str) -> Mapping[str, str]:
    """The table of a language, by the English text.

    Raises:
        InputError: there is none.
    """
    if language == ENGLISH:
        return {}
    tables = files("contextlm.report") / "languages"
    known = sorted(file.name.removesuffix(".yaml") for file in tables.iterdir())
    if language not in known:
        expected = " or ".join([ENGLISH, *known])
        raise InputError(f"--language {shown(language)}: expected {expected}")
    return dict(yaml.safe_load((tables / f"{language}.yaml").read_text("utf-8")))


@contextmanager
def speaking(language: str) -> Iterator[None]:
    """Within the block, `say` speaks this language.

    Raises:
        InputError: there is no table of it.
    """
    translations(language)
    token = _spoken.set(language)
    try:
        yield
    finally:
        _spoken.reset(token)


def spoken() -> str:
    """The language of the moment: ``en``, ``ja``."""
    return _spoken.get()


def say(text: str, /, **values: Any) -> str:
    """A text of the report in the language of the moment, `values` filled in."""
    found = translations(_spoken.get()).get(text, text)
    return found.format(**values) if values else found
