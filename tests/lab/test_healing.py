"""Recipes whose contenders are trained already: compared, and refused where they cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from contextlm import compressed_model
from contextlm.base.errors import InputError, RunError
from contextlm.base.progress import SilentProgress
from contextlm.evaluation.checkpoint import load_checkpoint
from contextlm.evaluation.quality import evaluate_quality
from contextlm.lab.estimate import count_parameters, dry_run
from contextlm.lab.grid import Point
from contextlm.lab.jobs import Planner
from contextlm.lab.model_card import model_card
from contextlm.lab.preparation import prepare
from contextlm.lab.pretrained import (
    Start,
    as_trained,
    config_of,
    rows_to_calibrate,
    text_to_read,
)
from contextlm.lab.running import extend, resume, run
from contextlm.lab.work import _result
from contextlm.models.build import build_config, create_model, meta_model
from contextlm.recipe.loading import dump_recipe, load_recipe
from contextlm.recipe.schema import Contender
from contextlm.results.facts import EmbeddingFacts

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
    # In bfloat16, as most are: trained in float32, and saved as it was.
    sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    ends = {"eos_token_id": 256, "bos_token_id": 256}
    far = {"dtype": "bfloat16", "initializer_range": 0.2}  # from a uniform guess
    saved(tmp_path / "model", LlamaConfig(**sizes, **heads, **ends, **far))
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
    assert cost.flops == plain.flops * 4 / 3  # a teacher reads, too
    assert cost.memory_bytes_estimate > plain.memory_bytes_estimate

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
    # What is told is of the weights that were saved.
    opened, _ = load_checkpoint(folder / "latent" / "seed-0" / "checkpoint", "cpu")
    assert opened.dtype == torch.bfloat16
    validation = prepare(read, torch.device("cpu")).entries["latent"].validation
    quality = evaluate_quality(opened, validation, 8, torch.device("cpu"))
    assert results["latent"]["validation_loss"] == quality.loss
    assert healing["tokens"] == 64  # as many as the model has positions
    # What the weights were decides the job, like the policy and the text that it is measured on.
    job = json.loads((folder / "latent" / "seed-0" / "job.json").read_text())["decides"]
    assert job["trained"]["policy"] == "latent:25%"
    assert len(job["trained"]["held_out"]) == 64
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
        "contenders.latent.healing.train=lora",
        "training.epochs=2",
    ]
    read = load_recipe(recipe, overrides=changes)
    monkeypatch.setattr("contextlm.lab.running.write_report", lambda *_: None)  # takes seconds
    folder = run(read, tmp_path / "one", device="cpu", progress=SilentProgress())
    whole = folder / "latent" / "seed-0"

    def stopped(_: object, number: int, *others: object) -> None:
        if number == 2:
            raise RunError("the power failed")

    with monkeypatch.context() as patch:
        patch.setattr("contextlm.lab.work.EpochWatcher.on_epoch_begin", stopped)
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
        (["contenders.original.healing={train: policy}"], "a model without a policy has nothing"),
        (["target_offset=2"], "target_offset: contenders.latent is healed, to predict the next"),
        (
            ["contenders.latent.training.parameter_groups=[{match: '*wte*'}]"],
            "'*wte*' matches no trainable parameter",
        ),
        (
            [
                "contenders.latent.healing={train: policy}",
                "contenders.latent.training.parameter_groups=[{match: '*mlp*'}]",
            ],
            "'*mlp*' matches no trainable parameter",
        ),
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
    rows = rows_to_calibrate(np.arange(100_000), None)
    assert rows.shape == (8, 1024)
    assert rows[0, 0] == 0
    assert rows[-1, -1] == 99_999
    assert rows_to_calibrate(np.arange(30), None).shape == (1, 30)
    assert rows_to_calibrate(np.arange(100_000), 512).shape == (16, 512)


def test_a_text_to_read_is_one_document_if_one_is_long_enough() -> None:
    documents = [np.full(3, 1), np.full(9, 2), np.full(9, 3)]
    assert text_to_read(documents, 4).tolist() == 9 * [2]
    assert text_to_read(documents, 2).tolist() == 3 * [1]
    assert text_to_read(documents, 9).tolist() == 3 * [1] + 9 * [2] + 7 * [3]


def contender(**fields: Any) -> Contender:
    return Contender.model_validate({"name": "it", "from": "model", **fields})


def started(entry: Contender) -> Start:
    return Start.of(entry, np.arange(600) % 257, torch.device("cpu"), seed=0)


@pytest.mark.parametrize(
    ("policy", "train"),
    [
        (None, "all"),
        (None, "lora"),
        *(("latent:25%", train) for train in ("all", "lora", "policy")),
    ],
)
def test_what_trains_is_what_was_counted(recipe: str, policy: str | None, train: str) -> None:
    entry = contender(policy=policy, healing={"train": train, "rank": 3})
    training = {n: p.shape for n, p in started(entry).model.named_parameters() if p.requires_grad}
    counted = as_trained(entry, meta_model(config_of(entry, 257))).named_parameters()
    assert {n: p.shape for n, p in counted if p.requires_grad} == training
    assert any("lora" in name for name in training) == (train == "lora")
    assert any("cache_weights" in name for name in training) == (policy is not None)
    assert any("embed_tokens" in name for name in training) == (train == "all")


@pytest.mark.parametrize("policy", [None, "window:8"])
def test_a_finished_model_is_what_opens_again(recipe: str, policy: str | None) -> None:
    """Rotary frequencies are in no file: in bfloat16 they would not be the opened model's."""
    start = started(contender(policy=policy, healing={"train": "lora"}))
    assert {p.dtype for p in start.model.parameters()} == {torch.float32}
    made = start.finish()
    made.save_pretrained("made")
    opened = AutoModelForCausalLM.from_pretrained("made")
    ids = torch.arange(60)[None]
    assert made.dtype == opened.dtype == torch.bfloat16
    assert torch.equal(made(ids).logits, opened(ids).logits)
    for name, buffer in opened.named_buffers():
        assert torch.equal(dict(made.named_buffers())[name], buffer), name


def test_what_a_configuration_freezes_stays_frozen(recipe: str, tmp_path: Path) -> None:
    fields = {"type": "context_kv", "hidden_size": 16, "context_dim": 8, "num_attention_heads": 2}
    config = build_config(fields, 257)
    create_model(config, 0).save_pretrained("own")
    for file in (tmp_path / "model").glob("tokenizer*"):
        (tmp_path / "own" / file.name).write_bytes(file.read_bytes())
    entry = contender(**{"from": "own"})
    frozen = {n for n, p in started(entry).model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, p in meta_model(config).named_parameters() if not p.requires_grad}
    assert any("context_block" in name for name in frozen)


def test_a_model_that_keeps_a_policy_is_trained_on_under_it(recipe: str, tmp_path: Path) -> None:
    model, tokenizer = load_checkpoint(tmp_path / "model", "cpu")
    compressed_model(model, "window:8,sinks:2").save_pretrained("kept")
    tokenizer.save_pretrained("kept")
    changes = ["contenders.fresh=null", "contenders.latent.from=kept"]
    with pytest.raises(
        InputError, match=r"contenders.latent: this model keeps .* window:8,sinks:2"
    ):
        prepare(load_recipe(recipe, overrides=changes), torch.device("cpu"))
    changes += ["contenders.latent.policy=null", "contenders.latent.healing=null"]
    read = load_recipe(recipe, overrides=changes)
    plain, cost = dry_run(read, device="cpu").contenders
    assert cost.flops == plain.flops
    prepared = prepare(read, torch.device("cpu"))
    entry = prepared.entries["latent"]
    found = _result(Planner(prepared).jobs[1], prepared, entry, entry.meta, 1.0, 0.5)
    facts = EmbeddingFacts(source="pretrained", path="kept")
    card = model_card(found.model_copy(update={"embedding": facts}), read, entry)
    assert "kept, decoding by the cache policy window:8,sinks:2" in card
    assert "import contextlm" in card


def test_the_planner_knows_a_trained_model_by_its_files(recipe: str) -> None:
    planner = Planner(prepare(load_recipe(recipe), torch.device("cpu")))
    trained = [job.decides.get("trained") for job in planner.jobs]
    assert trained[0]["files"] == trained[1]["files"]
    assert trained[2] is None
