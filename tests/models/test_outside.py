"""Architectures from outside: what is imported, what its hash covers, what is refused."""

from __future__ import annotations

import hashlib
import json
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from contextlm.base.errors import InputError
from contextlm.lab.environment import check_imported
from contextlm.lab.model_card import _loading
from contextlm.models.base import registry
from contextlm.models.build import build_config, meta_model
from contextlm.models.outside import import_offered, import_outside, outside, sources

FILE = Path(__file__).parents[1] / "lab" / "gated_delta.py"
FIELDS = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.fixture(autouse=True)
def clean(forget_outside):
    """Nothing of what these tests import stays."""


def test_a_file_is_known_from_its_import_on_and_its_hash_is_that_of_what_uses_it(tmp_path):
    path = tmp_path / "gated_delta.py"
    path.write_bytes(FILE.read_bytes())
    with pytest.raises(InputError, match="unknown model type 'gated_delta'"):
        build_config({"type": "gated_delta"}, 11)
    import_outside([str(path)])
    import_outside([str(path)])  # once more is nothing
    assert registry()["gated_delta"].description.startswith("Gated delta rule")
    ours = meta_model(build_config({"type": "gated_delta", **FIELDS}, 11))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert sources(ours) == {"gated_delta": digest}
    assert sources(meta_model(build_config({"type": "gpt2", "n_embd": 8, "n_head": 2}, 11))) == {}
    found = outside()["gated_delta"]
    assert (found.given, found.place, found.on_request) == (str(path), path, True)


def test_of_a_package_every_file_counts(tmp_path, monkeypatch):
    package = tmp_path / "delta_models"
    (package / "parts").mkdir(parents=True)
    (package / "__init__.py").write_text("from delta_models.gated import *\n")
    (package / "parts" / "__init__.py").write_text("")
    (package / "gated.py").write_bytes(FILE.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    import_outside(["delta_models"])
    assert outside()["delta_models"].place == package
    model = meta_model(build_config({"type": "gated_delta", **FIELDS}, 11))
    entry = SimpleNamespace(meta=model)
    assert any('(["delta_models"])' in line for line in _loading(entry, ours=True))
    before = sources(model)["delta_models"]
    (package / "parts" / "__init__.py").write_text("changed = True\n")
    import_outside(["delta_models.gated"])  # read again
    assert sources(model)["delta_models"] != before


@pytest.mark.parametrize(("place", "given"), [("/a/mine.py", "/a/mine.py"), ("/a/mine", "mine")])
def test_a_run_names_what_to_import_again(tmp_path, place, given):
    begun = {"architectures": {"mine": f"{place} (sha256 0)"}}
    (tmp_path / "environment.json").write_text(json.dumps(begun))
    with pytest.raises(InputError, match=f"begun with mine: give --import {given} again"):
        check_imported(tmp_path)


def test_what_an_installed_package_offers_is_imported(tmp_path, monkeypatch):
    (tmp_path / "offered.py").write_bytes(FILE.read_bytes())
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.syspath_prepend(tmp_path)

    def offer(*modules):
        points = [metadata.EntryPoint(m, m, "contextlm.architectures") for m in modules]
        monkeypatch.setattr(metadata, "entry_points", lambda group: points)

    offer("offered")
    import_offered()
    assert not outside()["offered"].on_request
    assert "gated_delta" in registry()
    offer("broken")
    with pytest.raises(InputError, match=r"entry point broken: ModuleNotFoundError: .*nowhere"):
        import_offered()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.py", None, r"--import missing\.py: no such file"),
        ("missing_module", None, "no such file, and no module that Python finds"),
        ("not a module", None, "no such file"),
        ("torch.py", "", "a module of that name is loaded already: rename the file"),
        ("my-model.py", "", "no identifier: rename the file"),
        ("notes.txt", "", "expected a Python file"),
        ("slip.py", "x = 1\ny = (\n", r"slip\.py: line 2: SyntaxError"),
        ("fault.py", "x = 1\n\ny = x.z\n", r"fault\.py: line 3: AttributeError"),
    ],
)
def test_what_cannot_be_imported_is_one_line(tmp_path, monkeypatch, name, text, message):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        import_outside([name])
    assert "\n" not in str(caught.value)
    assert Path(name).stem not in outside()
    assert name == "torch.py" or Path(name).stem not in sys.modules


def test_a_worker_imports_what_the_run_began_with(tmp_path, monkeypatch, forget_outside):
    from contextlm.lab import executors
    from contextlm.lab.jobs import Planner
    from contextlm.lab.preparation import prepare
    from contextlm.recipe.loading import load_recipe

    monkeypatch.setenv("CONTEXTLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "notes.txt").write_text("\n".join(f"Line {n} of {n * n % 97}." for n in range(400)))
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(
        f"""
name: toy
question: Does a worker know it?
corpus: text:{tmp_path / "notes.txt"}
tokenizer: bpe:300
sequence_length: 8
samples: {{train: 4, validation: 2}}
training: {{epochs: 1, precision: float32}}
evaluation: {{cache_lengths: [8], speed_tokens: 8}}
contenders:
  - name: mine
    baseline: true
    model: {{type: gated_delta, hidden_size: 8, num_attention_heads: 2, intermediate_size: 8}}
"""
    )
    import_outside([str(FILE)])
    resolved = load_recipe(str(recipe))
    (job,) = Planner(prepare(resolved, torch.device("cpu"))).jobs
    given = [found.given for found in outside().values() if found.on_request]
    forget_outside()
    (tmp_path / "run").mkdir()
    executors._work(job, resolved, "cpu", tmp_path / "run", given, [])
    assert (tmp_path / "run" / "mine" / "seed-0" / "result.json").is_file()
