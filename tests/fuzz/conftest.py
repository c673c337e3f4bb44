"""Folders for the fuzz tests, and a run to damage."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from attempts import RECIPE, WORDS
from typer.main import get_command

from contextlm.cli import app
from contextlm.cli.shell import execute


@pytest.fixture(scope="session")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch) -> Path:
    """The current folder of all commands; the cache lies elsewhere."""
    folder = tmp_path_factory.mktemp("fuzz")
    patch.setenv("CONTEXTLM_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.delenv("CONTEXTLM_DATA", raising=False)
    # The same commands each time: making them takes longer than most of what is tried.
    patch.setattr("contextlm.cli.shell.get_command", functools.cache(get_command))
    patch.chdir(folder)
    (folder / "notes.txt").write_text(WORDS * 8)
    return folder


@pytest.fixture(scope="session")
def trained(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of two contenders, trained for real; it lies elsewhere."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # as they are in a command's own process
    out = tmp_path_factory.mktemp("trained")
    recipe = out / "toy.yaml"
    recipe.write_text(RECIPE)
    assert execute(app, ["run", str(recipe), "--device", "cpu", "--out", str(out)]) == 0
    return out / "toy-001"


@pytest.fixture
def run(place: Path, trained: Path) -> Iterator[Path]:
    """A copy of the run without what `report` does not read."""
    folder = place / "run-001"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("checkpoint", "*.png", "*.md"))
    (folder / "report.html").unlink()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def checkpoint(place: Path, trained: Path) -> Iterator[Path]:
    folder = place / "checkpoint"
    shutil.copytree(trained / "base" / "seed-0" / "checkpoint", folder)
    yield folder
    shutil.rmtree(folder)
