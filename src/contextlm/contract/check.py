"""Running the contract tests on what a file registers, wherever contextlm is installed."""

from __future__ import annotations

import importlib.util
import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

from contextlm.base.errors import InputError
from contextlm.models import base
from contextlm.models.hybrid.mixer import mixers

TESTS = Path(__file__).with_name("architecture.py")
HYBRID = "context_hybrid"  # whose patterns a mixer's letter stands in

Variant = tuple[str, int]  # a model type, and which of its `tiny` settings


def check(importing: Callable[[], None], options: list[str]) -> int:
    """Run the contract tests on the architectures and mixers that become known.

    pytest prints what it finds.

    Args:
        importing: registers them.
        options: further ones for pytest.

    Returns:
        pytest's exit code: 0 where all passed, 1 where some failed.

    Raises:
        InputError: pytest is not installed or refuses an option, or nothing becomes known.
    """
    if importlib.util.find_spec("pytest") is None:
        raise InputError("contextlm check needs pytest (the extra check): pip install pytest")
    import pytest

    known, letters = base.registry(), mixers()
    importing()
    variants = [
        (name, index)
        for name, entry in base.registry().items()
        if name not in known
        for index in range(len(entry.tiny))
    ]
    new = [letter for letter in mixers() if letter not in letters]
    with _patterns_of(new) as of_letters, tempfile.TemporaryDirectory() as folder:
        wanted = [*variants, *of_letters]
        if not wanted:
            raise InputError("nothing to check: no architecture and no mixer was registered")
        settings = Path(folder, "pytest.ini")  # else one that lies above the tests would count
        settings.write_text("[pytest]\n", "utf-8")
        apart = ["-c", str(settings), "--rootdir", folder, "--noconftest", "-p", "no:cacheprovider"]
        shown = ["-q", "-rs", "--disable-warnings", *options]
        with redirect_stderr(io.StringIO()) as told:  # what tests write there, pytest takes itself
            code = pytest.main([*apart, *shown, str(TESTS)], [_Only(wanted)])
        if code == pytest.ExitCode.USAGE_ERROR:
            raise InputError(told.getvalue().removeprefix("ERROR: "))
        return int(code)


@contextmanager
def _patterns_of(letters: list[str]) -> Iterator[list[Variant]]:
    """Variants of the hybrid for each letter: with and without feed-forward part, and beside R."""
    entry = base.registry()[HYBRID]
    tiny = {**entry.tiny[0], "tie_word_embeddings": False}
    patterns = [pattern for x in letters for pattern in (x, f"{x.lower()}R{x}")]
    added = tuple({**tiny, "pattern": pattern} for pattern in patterns)
    base._REGISTRY[HYBRID] = replace(entry, tiny=(*entry.tiny, *added))
    try:
        yield [(HYBRID, len(entry.tiny) + number) for number in range(len(added))]
    finally:
        base._REGISTRY[HYBRID] = entry


class _Only:
    """A plugin of pytest that leaves the tests of some variants."""

    def __init__(self, variants: list[Variant]):
        self.variants = variants

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Called by pytest with all that it has found."""
        kept = []
        for item in items:
            parameters = item.callspec.params
            if parameters.get("built", parameters.get("variant")) in self.variants:
                kept.append(item)
        items[:] = kept
