"""docs/adding-an-architecture.md is executed: its file, the contract tests on it, its recipe."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import contextlm
from contextlm.base.progress import SilentProgress
from contextlm.lab.running import run
from contextlm.models import base
from contextlm.recipe.loading import load_recipe
from contextlm.results.result import read_run

CONTRACT = Path(contextlm.__file__).parent / "contract" / "architecture.py"
ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding-an-architecture.md").read_text("utf-8")


def block(language: str) -> str:
    found = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert len(found) == 1, f"the page should hold one {language} block"
    return found[0]


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def leaky_average(tmp_path_factory):
    """The page's file, imported as it would be from the models folder; gone after the tests."""
    path = tmp_path_factory.mktemp("models") / "leaky_average.py"
    path.write_text(block("python"), "utf-8")
    before = set(base.registry())
    module = load("leaky_average", path)
    assert set(base.registry()) - before == {"leaky_average"}
    yield module
    base._REGISTRY.pop("leaky_average")
    sys.modules.pop("leaky_average")


def contract_tests() -> list[tuple[str, dict[str, object]]]:
    """Every contract test by name, once for each of its parameters."""
    module = load("contract_of_the_page", CONTRACT)
    calls: list[tuple[str, dict[str, object]]] = []
    for name, test in inspect.getmembers(module, inspect.isfunction):
        if name.startswith("test_"):
            marks = [m for m in getattr(test, "pytestmark", []) if m.name == "parametrize"]
            arguments = [{m.args[0]: value} for m in marks for value in m.args[1]] or [{}]
            if "variant" in inspect.signature(test).parameters:  # it walks the registry itself
                arguments = [{"variant": ("leaky_average", 0)}]
            calls += [(name, argument) for argument in arguments]
    return calls


@pytest.mark.parametrize(("name", "arguments"), contract_tests())
def test_the_pages_architecture_keeps_the_contract(leaky_average, name, arguments, tmp_path):
    test = getattr(sys.modules["contract_of_the_page"], name)
    entry = base.registry()["leaky_average"]
    torch.manual_seed(0)
    model = entry.model(entry.config(**entry.tiny[0])).double().eval()
    if "tmp_path" in inspect.signature(test).parameters:
        arguments = {**arguments, "tmp_path": tmp_path}
    test(**arguments) if "variant" in arguments else test(model, **arguments)


def test_the_model_is_the_pages_equations(leaky_average):
    torch.manual_seed(0)
    config = leaky_average.LeakyAverageConfig(vocab_size=11, hidden_size=4)
    model = leaky_average.LeakyAverageForCausalLM(config).double().eval()
    ids = [3, 1, 4, 1, 5]
    keep = torch.sigmoid(model.model.decay)
    mean, expected = torch.zeros(4, dtype=torch.float64), []
    for token in ids:
        embedded = model.model.embed_tokens.weight[token]
        mean = keep * mean + (1 - keep) * embedded
        expected.append(model.lm_head.weight @ model.model.mlp(torch.cat([embedded, mean])))
    torch.testing.assert_close(model(torch.tensor([ids])).logits[0], torch.stack(expected))


def test_the_pages_recipe_runs(leaky_average, tmp_path, monkeypatch):
    monkeypatch.setenv("CONTEXTLM_CACHE", str(tmp_path / "cache"))
    recipe = tmp_path / "leaky.yaml"
    recipe.write_text(block("yaml"), "utf-8")
    folder = run(load_recipe(str(recipe)), tmp_path, device="cpu", progress=SilentProgress())
    assert folder.name == "leaky-001"
    assert (folder / "report.html").is_file()
    results = {o.result.contender: o.result for o in read_run(folder).outcomes}
    cache = {entry.tokens: entry.logical for entry in results["leaky-average"].cache}
    assert cache[32] == cache[128] == 32 * 4 + 8  # one vector, and the row's count of tokens
    attention = {entry.tokens: entry.logical for entry in results["attention"].cache}
    assert attention[128] == 4 * attention[32]
