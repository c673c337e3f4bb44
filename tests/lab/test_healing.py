"""Recipes whose contenders are trained already: compared, and refused where they cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from contextlm.base.errors import InputError, RunError
from contextlm.base.progress import SilentProgress
from contextlm.lab.estimate import count_parameters, dry_run
from contextlm.lab.grid import Point
from contextlm.lab.jobs import Planner
from contextlm.lab.preparation import prepare
from contextlm.lab.pretrained import rows_to_calibrate
from contextlm.lab.running import extend, resume, run
from contextlm.recipe.loading import dump_recipe, load_recipe

RECIPE = """
name: healed
question: What does healing buy?
corpus: text:notes.txt
tokenizer: model
sequence_length: 16
samples: {train: 16, validation: 4}
training: {batch_size: 8, epochs: 1, precision: float32, learning_rate: 0.0003}
evaluation: {cache_lengths: [16], speed_tokens: 8}
contenders:
  - name: original
    baseline: true
    from: model
  - name: latent
    from: model
    policy: latent:25%
    healing: {loss: 0.0, kl: 1.0}
  - name: fresh
    model: {type: llama, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2,
            num_key_value_heads: 2, intermediate_size: 16}
"""


@pytest.fixture
def recipe(tmp_path: Path, saved: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe beside the model and the text that it names."""
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    ends = {"eos_token_id": 256, "bos_token_id": 256}
    saved(tmp_path / "model", LlamaConfig(**sizes, **heads, **ends, initializer_range=0.2))
    lines = (f"Line {n} has {n * n % 97} words, or {n % 7} letters." for n in range(200))
    Path("notes.txt").write_text("\n".join(lines), "utf-8")
    Path("healed.yaml").write_text(RECIPE, "utf-8")
    return "healed.yaml"


def test_a_recipe_compares_what_is_healed(recipe: str, tmp_path: Path) -> None:
    read = load_recipe(recipe)
    assert read.contender("latent").from_ == str(tmp_path / "model")
    assert read.written["contenders.latent.from"] == "model"
    Path("again.yaml").write_text(dump_recipe(read), "utf-8")
    assert load_recipe("again.yaml") == read
    counted = {each.name: each for each in count_parameters(read)}
    added = 2 * (16 * 4 + 4 + 4 * 16 + 16)  # down and up with their biases, of both layers
    assert counted["latent"].total == counted["original"].total + added
    plain, cost, _ = dry_run(read, device="cpu").contenders
    assert cost.seconds_estimate is not None
    assert cost.flops == plain.flops

    folder = run(read, tmp_path / "runs", device="cpu", progress=SilentProgress())
    results = {
        name: json.loads((folder / name / "seed-0" / "result.json").read_text())
        for name in ("original", "latent", "fresh")
    }
    assert results["original"]["healing"] is results["fresh"]["healing"] is None
    healing = results["latent"]["healing"]
    assert healing["after"]["kl"] < healing["before"]["kl"]
    assert results["latent"]["embedding"] == {
        **results["original"]["embedding"],
        "source": "pretrained",
        "path": "model",
    }
    report = (folder / "report.md").read_text()
    assert "latent:25%" in report
    card = (folder / "latent" / "seed-0" / "checkpoint" / "README.md").read_text()
    assert "towards the original" in card
    assert "import contextlm" in card
    # What the weights were decides the job, like the policy.
    job = json.loads((folder / "latent" / "seed-0" / "job.json").read_text())["decides"]
    assert job["trained"]["policy"] == "latent:25%"
    config = Path("model/config.json")
    config.write_text(config.read_text().replace("{", '{"changed": true,', 1))
    with pytest.raises(InputError, match=r"original, seed 0: .*trained.files differs"):
        extend([Point({}, read, "")], folder, device="cpu", progress=SilentProgress())


def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [
        "contenders.fresh=null",
        "contenders.original=null",
        "contenders.latent.baseline=true",
    ]
    changes.append("contenders.latent.healing.train=lora")
    read = load_recipe(recipe, overrides=changes)
    folder = run(read, tmp_path / "one", device="cpu", progress=SilentProgress())
    whole = folder / "latent" / "seed-0"

    def stopped(*_: object) -> None:
        raise RunError("the power failed")

    with monkeypatch.context() as patch:
        patch.setattr("contextlm.lab.pretrained.Start.facts", stopped)
        with pytest.raises(RunError, match="the power failed"):
            run(read, tmp_path / "two", device="cpu", progress=SilentProgress())
    again = tmp_path / "two" / "healed-001"
    resume(again, device="cpu", progress=SilentProgress())
    for name in ("result.json", "checkpoint/model.safetensors"):
        assert (again / "latent" / "seed-0" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["contenders.latent.policy=int8"], "contenders.latent: policy int8 cannot be healed"),
        (["contenders.latent.from=nowhere"], "model 'nowhere', no folder here"),
        (["contenders.latent.model={type: llama}"], "model: does not go with `from`"),
        (["contenders.fresh.policy=window:8"], "policy: is for a model that is trained already"),
        (["contenders.latent.healing={loss: 0.0, kl: 0.0}"], "loss and kl are both 0"),
        (["contenders.latent.healing={train: most}"], "contenders.latent.healing.train"),
        (["tokenizer=word:99"], "contenders.original.from: its tokenizer is another than"),
        (["embedding=learned"], "contenders.original: embedding: a model `from` somewhere brings"),
        (["contenders.other={form: model}"], "unknown contender of healed.yaml: 'other'"),
    ],
)
def test_what_cannot_be_is_one_line(
    recipe: str, changes: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("contextlm.data.hub.hub_reachable", lambda: False)
    with pytest.raises((InputError, RunError)) as caught:
        prepare(load_recipe(recipe, overrides=changes), torch.device("cpu"))
    said = str(caught.value)
    assert message in said
    assert "\n" not in said


def test_rows_to_calibrate_come_from_all_over_the_text() -> None:
    rows = rows_to_calibrate(np.arange(100_000))
    assert rows.shape == (8, 1024)
    assert rows[0, 0] == 0
    assert rows[-1, -1] == 99_999
    assert rows_to_calibrate(np.arange(30)).shape == (1, 30)


def test_the_planner_knows_a_trained_model_by_its_files(recipe: str) -> None:
    planner = Planner(prepare(load_recipe(recipe), torch.device("cpu")))
    trained = [job.decides.get("trained") for job in planner.jobs]
    assert trained[0]["files"] == trained[1]["files"]
    assert trained[2] is None
