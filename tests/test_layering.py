"""The rooms of the package, who may import whom, and that nothing imports in a circle.

    base <- ops <- models <- {compress, training} <- evaluation <- lab <- cli

`data`, `recipe` and `results` import base only; `report` reads results; training and evaluation do
not know each other. Imports inside functions count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import contextlm

PACKAGE = Path(contextlm.__file__).parent

# What each room may import besides itself.
MAY_IMPORT: dict[str, set[str]] = {
    "base": set(),
    "ops": {"base"},
    "data": {"base"},
    "recipe": {"base"},
    "results": {"base"},
    "models": {"base", "ops"},
    "compress": {"base", "ops", "models"},
    "training": {"base", "ops", "models", "data", "recipe", "results"},
    "evaluation": {"base", "ops", "models", "compress", "data", "recipe", "results"},
    "contract": {"base", "models", "evaluation"},
    "report": {"base", "results"},
    "lab": {
        "base",
        "models",
        "compress",
        "data",
        "recipe",
        "results",
        "training",
        "evaluation",
        "report",
    },
    "benchmarks": {
        "base",
        "ops",
        "models",
        "compress",
        "data",
        "recipe",
        "training",
        "evaluation",
        "lab",
    },
    "cli": {
        "base",
        "models",
        "compress",
        "data",
        "recipe",
        "results",
        "evaluation",
        "report",
        "lab",
        "benchmarks",
        "contract",
    },
    "__main__": {"cli"},
    "__init__": {"models", "compress"},
}


def imported(source: str) -> Iterator[tuple[int, str]]:
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
    return [
        f"{module}, line {line}: imports {name}"
        for line, name in imported(source)
        if name.partition(".")[0] not in MAY_IMPORT[room] | {room, "__version__"}
    ]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def test_nothing_stands_outside_the_rooms() -> None:
    found = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    files = {"__init__.py", "__main__.py", "py.typed", "recipes"}
    assert found == files | {room for room in MAY_IMPORT if not room.startswith("__")}


@pytest.mark.parametrize("module", MODULES)
def test_imports_keep_their_direction(module: str) -> None:
    assert violations(module, MODULES[module].read_text("utf-8")) == []


def test_modules_do_not_import_in_a_circle() -> None:
    graph = {
        module: {
            target
            for _, name in imported(path.read_text("utf-8"))
            for target in (name, name.rpartition(".")[0])
            if target in MODULES and target != module
        }
        for module, path in MODULES.items()
    }
    # A package's face imports what is inside, and what is inside does not need the face.
    while free := [module for module, targets in graph.items() if not targets & graph.keys()]:
        for module in free:
            del graph[module]
    assert graph == {}


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("ops.linear_scan", "from contextlm.models.base import registry"),
        ("ops.linear_scan", "import contextlm.data.windows"),
        ("models.base", "from contextlm.training import oacd"),
        ("models.base", "from contextlm import evaluation"),
        ("data.windows", "from contextlm.models import layers"),
        ("data.windows", "from contextlm.recipe.schema import Recipe"),
        ("training.oacd", "from contextlm.evaluation.quality import Quality"),
        ("evaluation.quality", "from contextlm.training import next_token"),
        ("report.page", "from contextlm.evaluation.quality import evaluate_quality"),
        ("recipe.schema", "from contextlm.training.oacd import train_context_block"),
        ("training.oacd", "from contextlm.lab.running import run"),
        ("lab.running", "from contextlm.cli import main"),
        ("base.errors", "from contextlm.recipe.schema import Recipe"),
        ("cli.output", "from contextlm.training.oacd import train_context_block"),
    ],
)
def test_a_planted_violation_is_caught(module: str, line: str) -> None:
    assert len(violations(module, line)) == 1
    assert len(violations(module, f"def inside():\n    {line}\n")) == 1
