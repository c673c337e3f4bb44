"""Folders for the fuzz tests, and the list of messages that they provoked."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from attempts import MESSAGES
from typer.main import get_command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of the test file's own, the current one meanwhile; the cache lies elsewhere."""
    folder = tmp_path_factory.mktemp("fuzz")
    patch = pytest.MonkeyPatch()
    patch.setenv("CONTEXTLM_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.delenv("CONTEXTLM_DATA", raising=False)
    # The same commands each time: making them takes longer than most of what is tried.
    patch.setattr("contextlm.cli.shell.get_command", functools.cache(get_command))
    patch.chdir(folder)
    # A plan's seconds rest on a measurement, which is nobody's input.
    patch.setattr("contextlm.lab.estimate._matmul_flops_per_second", lambda device, dtype: 1e10)
    yield folder
    patch.undo()


@pytest.fixture(scope="session", autouse=True)
def _list_of_messages() -> Iterator[None]:
    yield
    listed = os.environ.get("CONTEXTLM_FUZZ_MESSAGES")
    if listed:
        with Path(listed).open("a", encoding="utf-8") as stream:
            stream.writelines(f"{count}\t{text}\n" for text, count in sorted(MESSAGES.items()))
