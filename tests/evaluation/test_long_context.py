"""Perplexity by position against one forward pass a window, and what `eval --long` reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from contextlm.base.errors import InputError
from contextlm.base.progress import SilentProgress
from contextlm.cli import app
from contextlm.cli.shell import execute
from contextlm.evaluation.long_context import (
    bucket_edges,
    buckets,
    losses_by_position,
    windows_of,
)
from contextlm.evaluation.long_report import evaluate_long
from contextlm.evaluation.memory import position_limit
from contextlm.evaluation.trained import Trained, read_trained
from contextlm.lab.experiment import run
from contextlm.models.base import registry
from contextlm.models.build import build_config, create_model
from contextlm.recipe.schema import load_recipe
from contextlm.results.result import seed_folder

CPU = torch.device("cpu")
MODELS = [
    *((name, index) for name, entry in registry().items() for index in range(len(entry.tiny))),
    ("mamba", None),
]


@pytest.fixture(params=MODELS, ids=lambda model: "-".join(map(str, model)))
def model(request: pytest.FixtureRequest) -> Any:
    name, index = request.param
    torch.manual_seed(0)
    if index is None:
        small = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
        return create_model(build_config({"type": name, **small}, 50), 0).double()
    entry = registry()[name]
    return entry.model(entry.config(**entry.tiny[index])).double()


@pytest.mark.parametrize("ahead", [1, 2])
@torch.no_grad()
def test_one_pass_in_chunks_equals_one_window_at_once(model: Any, ahead: int) -> None:
    length = min(45, position_limit(model) or 45)
    draw = np.random.default_rng(0)
    drawn = draw.integers(1, model.config.vocab_size, (6, length + ahead)).astype(np.uint16)
    windows = list(drawn)
    found_P = losses_by_position(model, windows, ahead, CPU, chunk=7)
    assert model.training
    model.eval()
    expected_P = torch.zeros(length, dtype=torch.float64)
    for window in windows:
        ids_1N = torch.tensor(window.astype(np.int64))[None]
        logits_TV = model(ids_1N[:, :length]).logits[0]
        expected_P += F.cross_entropy(logits_TV.double(), ids_1N[0, ahead:], reduction="none")
    # Mamba's scan is in float32 whatever its weights are.
    rounding = 1e-5 if model.config.model_type == "mamba" else 1e-9
    torch.testing.assert_close(found_P, expected_P, rtol=rounding, atol=rounding)
    edges = bucket_edges(8, length)
    for bucket in buckets(found_P, len(windows), edges):
        mean = float(expected_P[bucket.first : bucket.last].mean()) / len(windows)
        assert bucket.loss == pytest.approx(mean, rel=rounding)
        assert bucket.tokens == len(windows) * (bucket.last - bucket.first)


def test_edges_double_up_to_the_training_length_and_step_by_it_beyond() -> None:
    assert bucket_edges(64, 256) == [0, 8, 16, 32, 64, 128, 192, 256]
    assert bucket_edges(64, 100) == [0, 8, 16, 32, 64, 100]
    assert bucket_edges(64, 12) == [0, 8, 12]
    assert bucket_edges(1, 3) == [0, 1, 2, 3]


def test_windows_come_from_as_many_documents_as_possible() -> None:
    documents = [np.arange(10), np.arange(20, 23), np.arange(30, 34)]
    found = [window.tolist() for window in windows_of(documents, 4, 3)]
    assert found == [[0, 1, 2, 3], [30, 31, 32, 33], [4, 5, 6, 7]]
    assert len(windows_of(documents, 4, 99)) == 3
    assert windows_of(documents, 11, 99) == []


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recalled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of recipe recall, seconds of it."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = load_recipe("recall", scale="smoke", overrides=["contenders.context-pythia=null"])
    return run(recipe, folder, device="cpu", progress=SilentProgress())


def test_a_run_reports_right_answers_by_level(recalled: Path) -> None:
    result = json.loads((seed_folder(recalled, "mha", 0) / "result.json").read_text())
    levels = result["retrieval"]
    assert [level["level"] for level in levels] == ["2 pairs", "4 pairs"]
    assert [level["answers"] for level in levels] == [2 * 20, 4 * 20]
    right = sum(level["accuracy"] * level["answers"] for level in levels)
    assert right / 120 == pytest.approx(result["accuracy"])
    assert result["bits_per_byte"] is None
    report = (recalled / "report.md").read_text()
    assert "| contender | right answers | validation PPL" in report
    assert "Right answers" in report
    assert "| 2 pairs | 4 pairs | all answers |" in report
    note = read_trained(seed_folder(recalled, "mha", 0) / "checkpoint")
    assert (note.unit, note.sequence_length) == ("answers", 16)


def test_eval_long_asks_other_questions(recalled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(seed_folder(recalled, "mamba", 0) / "checkpoint")
    options = ["eval", checkpoint, "--long", "--corpus", "recall:8", "--samples", "12"]
    assert execute(app, [*options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [entry["level"] for entry in report["retrieval"]] == ["2 pairs", "4 pairs", "8 pairs"]
    assert [entry["answers"] for entry in report["retrieval"]] == [4 * 2, 4 * 4, 4 * 8]
    assert report["positions"] == []
    assert (report["length"], report["trained"]) == (32, 16)
    assert report["cache"][0]["tokens"] == 32
    assert execute(app, options) == 0
    assert "8 pairs" in capsys.readouterr().out


def test_eval_long_goes_beyond_the_training_length(
    recalled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(40):
        text = "k1 v2 k3 v4 " * (40 + number % 2)
        (tmp_path / f"{number}.txt").write_text(text)
    checkpoint = seed_folder(recalled, "mha", 0) / "checkpoint"
    options = ["--long", "--corpus", f"text:{tmp_path}", "--samples", "3"]
    assert execute(app, ["eval", str(checkpoint), *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["length"] == 8 * 16
    edges = [(bucket["first"], bucket["last"]) for bucket in report["positions"]]
    assert edges[:5] == [(0, 2), (2, 4), (4, 8), (8, 16), (16, 32)]
    assert edges[-1] == (112, 128)
    assert sum(b["tokens"] for b in report["positions"]) == report["windows"] * 128
    assert [held["tokens"] for held in report["cache"]] == [last for _, last in edges]
    assert execute(app, ["eval", str(checkpoint), *options]) == 0
    assert "112 to 127" in capsys.readouterr().out


def test_a_position_limit_is_kept_and_told(recalled: Path, tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text("k1 v2 k3 v4 " * 40)
    checkpoint = seed_folder(recalled, "mha", 0) / "checkpoint"
    config = checkpoint / "config.json"
    before = config.read_text()
    config.write_text(json.dumps({**json.loads(before), "max_position_embeddings": 50}))
    try:
        report = evaluate_long(checkpoint, corpus=f"text:{tmp_path}", device="cpu", samples=2)
        with pytest.raises(InputError, match="has 64 tokens, more than the model's 50 positions"):
            evaluate_long(checkpoint, corpus="recall:16", device="cpu", samples=6)
    finally:
        config.write_text(before)
    assert report.length == report.positions[-1].last == 50
    assert "measured up to the model's 50 positions" in report.remarks


def test_a_note_from_before_lengths_were_noted(tmp_path: Path) -> None:
    (tmp_path / "contextlm.json").write_text('{"target_offset": 1, "unit": "lines"}')
    assert read_trained(tmp_path) == Trained(unit="lines")
    assert read_trained(tmp_path).sequence_length is None


def test_tasks_need_their_unit_and_their_tokenizer(recalled: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unit 'windows' does not fit corpus 'recall:4'"):
        run(
            load_recipe("recall", scale="smoke", overrides=["unit=windows"]),
            tmp_path,
            device="cpu",
            progress=SilentProgress(),
        )
    checkpoint = seed_folder(recalled, "mha", 0) / "checkpoint"
    assert execute(app, ["eval", str(checkpoint), "--long", "--cache-lengths", "8"]) == 2
    with pytest.raises(InputError, match="does not know all of its words"):
        evaluate_long(checkpoint, corpus="needles:2", device="cpu", samples=4)
