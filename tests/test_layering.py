"""The direction of imports (who may know whom) and the size of files.

    ops <- models <- {training, evaluation, benchmarks} <- experiment <- cli

`data` stands beside `models`, `report` reads results only, and leaves may be imported by all.
Imports inside functions count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import contextlm

PACKAGE = Path(contextlm.__file__).parent
MOST_LINES = 330

LEAVES = {
    "errors",
    "files",
    "paths",
    "progress",
    "device",
    "distribution",
    "strict_yaml",
    "merging",
    "locks",
    "interrupts",
    "visible",
}
# The schema of a comparison; it checks, it does nothing.
RECIPE = {"recipe", "recipe_parts", "recipe_problems"}
# What turns a recipe into a run.
EXPERIMENT = {
    "experiment",
    "plan",
    "preparation",
    "embeddings",
    "contexts",
    "contender",
    "live",
    "environment",
    "run_folder",
    "resume",
    "tuning",
    "processes",
    "sweep",
    "sweep_grid",
}

# What each room may import besides itself and the leaves. A room is a folder or a module directly
# below the package; "room.module" allows one module of a room.
MAY_IMPORT: dict[str, set[str]] = {
    **{leaf: set() for leaf in LEAVES},
    "ops": set(),
    "data": set(),
    "models": {"ops"},
    "training": {"ops", "models", "data"},
    "evaluation": {"ops", "models", "data"},
    "report": {"evaluation.facts", "evaluation.result"},
    "recipe": {"recipe_parts", "recipe_problems", "training.settings"},
    "recipe_parts": {"training.settings"},
    "recipe_problems": {"recipe_parts", "training.settings"},
    "benchmarks": {"ops", "models", "data", "training", "evaluation", *RECIPE},
    **{
        module: {"models", "data", "training", "evaluation", "report", *RECIPE, *EXPERIMENT}
        for module in EXPERIMENT
    },
    "cli": {"models", "data", "evaluation", "report", "benchmarks", *RECIPE, *EXPERIMENT},
    "__main__": {"cli"},
    "__init__": {"models"},
}


def rooms_imported(source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name, below the package, of everything of ours that a module imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from contextlm.models import base` may name a module or something inside one.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, below = name.partition(".")
            if top == "contextlm" and below:
                yield node.lineno, below


def violations(module: str, source: str) -> list[str]:
    """What `module` (dotted, below the package) imports although it must not."""
    room = module.partition(".")[0]
    found = []
    for line, name in rooms_imported(source):
        target, _, rest = name.partition(".")
        if target in LEAVES | {room, "__version__"} or target in MAY_IMPORT[room]:
            continue
        if f"{target}.{rest.partition('.')[0]}" not in MAY_IMPORT[room]:
            found.append(f"{module}, line {line}: imports {name}")
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def test_there_is_something_to_check() -> None:
    assert {"errors", "models.base", "evaluation.result", "cli", "recipe"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_keep_their_direction(module: str) -> None:
    room = module.partition(".")[0]
    assert room in MAY_IMPORT, f"say in {Path(__file__).name} what {room!r} may import"
    assert violations(module, MODULES[module].read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("ops.linear_scan", "from contextlm.models.base import registry"),
        ("ops.linear_scan", "import contextlm.data.windows"),
        ("models.base", "from contextlm.training import oacd"),
        ("models.base", "from contextlm import evaluation"),
        ("data.windows", "from contextlm.models import layers"),
        ("data.windows", "from contextlm.recipe import Recipe"),
        ("training.oacd", "from contextlm.evaluation.quality import Quality"),
        ("evaluation.quality", "from contextlm.training import next_token"),
        ("report.page", "from contextlm.evaluation import memory"),
        ("report.page", "from contextlm.evaluation.quality import evaluate_quality"),
        ("recipe", "from contextlm.training.oacd import train_context_block"),
        ("training.oacd", "from contextlm.experiment import run"),
        ("experiment", "from contextlm.cli import main"),
        ("errors", "from contextlm.recipe import Recipe"),
        ("progress", "import contextlm.models"),
        ("cli.output", "from contextlm.training.oacd import train_context_block"),
    ],
)
def test_a_planted_violation_is_caught(module: str, line: str) -> None:
    assert len(violations(module, line)) == 1
    assert len(violations(module, f"def inside():\n    {line}\n")) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("models.base", "from contextlm.ops.context_scan import context_scan"),
        ("report.page", "from contextlm.evaluation.result import Run"),
        ("report.page", "from contextlm.evaluation import result"),
        ("recipe", "from contextlm.training.settings import Settings"),
        ("ops.linear_scan", "from contextlm.errors import InputError"),
        ("training.oacd", "import torch, transformers.cache_utils"),
    ],
)
def test_what_is_allowed_passes(module: str, line: str) -> None:
    assert violations(module, line) == []


def test_no_file_holds_two_ideas() -> None:
    long = {
        str(path.relative_to(PACKAGE)): lines
        for path in PACKAGE.rglob("*")
        if path.suffix in {".py", ".html", ".md"}
        and (lines := len(path.read_text("utf-8").splitlines())) > MOST_LINES
    }
    assert long == {}
