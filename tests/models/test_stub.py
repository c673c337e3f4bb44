"""What is saved opens in a process that never imported contextlm, given trust_remote_code=True."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from contextlm.models.base import Architecture, register_architecture, registry
from contextlm.models.stub import NAME

# A client, first where contextlm is missing, then where it is installed. It saves what it opened.
CLIENT = """
import json, sys
from transformers import AutoConfig, AutoModelForCausalLM

folder, again = sys.argv[1:]
sys.modules["contextlm"] = None
try:
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
except ImportError as error:
    print(error)
del sys.modules["contextlm"]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert "contextlm" in sys.modules
model.save_pretrained(again)
print(type(model).__name__)
"""


def test_a_client_opens_what_is_saved_and_what_it_saves_opens_again(tmp_path: Path) -> None:
    entry = registry()["context_hybrid"]
    model = entry.model(entry.config(**entry.tiny[0]))
    model.save_pretrained(tmp_path / "saved")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", CLIENT, str(tmp_path / "saved"), str(tmp_path / "again")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    refused, opened = done.stdout.splitlines()
    assert refused.startswith("this model is a context_hybrid, an architecture of contextlm, which")
    assert "not installed here" in refused
    assert opened == "ContextHybridForCausalLM"
    # Nothing of the package's own source is copied, as it would be for other custom code.
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()}
    assert sorted(name for name in names if name.endswith(".py")) == [f"{NAME}.py"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


@pytest.mark.parametrize("name", registry())
def test_the_module_holds_the_classes_that_auto_map_names(name: str, tmp_path: Path) -> None:
    entry = registry()[name]
    entry.config(**entry.tiny[0]).save_pretrained(tmp_path)
    named = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    held = runpy.run_path(str(tmp_path / f"{NAME}.py"))
    found = {auto: held[kind.removeprefix(f"{NAME}.")] for auto, kind in named.items()}
    assert found == {
        "AutoConfig": entry.config,
        "AutoModel": entry.model.decoder_class,
        "AutoModelForCausalLM": entry.model,
    }


def test_the_official_way_is_what_happens_anyway(tmp_path: Path) -> None:
    entry = registry()["context_hybrid"]
    entry.model.register_for_auto_class("AutoModelForCausalLM")
    entry.config.register_for_auto_class()
    model = entry.model(entry.config(**entry.tiny[0]))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == {f"{NAME}.py"}
    assert model.config.auto_map["AutoModelForCausalLM"] == f"{NAME}.ContextHybridForCausalLM"


def test_a_strangers_auto_map_is_not_kept(tmp_path: Path) -> None:
    entry = registry()["context_hybrid"]
    entry.config(**entry.tiny[0]).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    evil = {**json.loads(file.read_text()), "auto_map": {"AutoConfig": "evil.Config"}}
    file.write_text(json.dumps(evil))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.auto_map == entry.config.auto_map == config.to_dict()["auto_map"]


def test_the_same_class_may_be_registered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = registry()["context_pythia"]
    monkeypatch.setattr("contextlm.models.base._REGISTRY", {"context_pythia": entry})
    register_architecture(tiny=entry.tiny)(entry.model)
    assert registry() == {"context_pythia": entry}
    # As a notebook does that runs a cell again.
    twin = type("ContextPythiaForCausalLM", (entry.model,), {"__module__": entry.model.__module__})
    register_architecture(tiny=entry.tiny)(twin)
    assert registry()["context_pythia"].model is twin
    register_architecture(tiny=entry.tiny)(entry.model)
    assert isinstance(registry()["context_pythia"], Architecture)
    other = type("Other", (entry.model,), {})
    with pytest.raises(ValueError, match="registered already"):
        register_architecture(tiny=())(other)
