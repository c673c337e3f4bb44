"""lm-eval's tasks on our models, from a small task of our own: no network is needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from contextlm.base.errors import InputError
from contextlm.base.progress import SilentProgress
from contextlm.cli import app
from contextlm.cli.shell import execute
from contextlm.evaluation import tasks
from contextlm.evaluation.checkpoint import TrainingNote, load_checkpoint, write_trained
from contextlm.lab.grid import Point
from contextlm.lab.running import extend, run
from contextlm.models.hybrid import ContextHybridConfig
from contextlm.recipe.loading import load_recipe
from contextlm.results.result import read_run

QUESTIONS = [
    {"text": f"{a} and {b} and", "choices": [" x", " yy", " zzz"], "answer": (a + b) % 3}
    for a in range(4)
    for b in range(3)
]
SHARED = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1.0}}
LETTERS = {
    **SHARED,
    "task": "letters",
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
WORDS = {
    **SHARED,
    "task": "words",
    "output_type": "generate_until",
    "doc_to_text": "{{text}}",
    "doc_to_target": " x",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture
def own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two tasks, which the environment names."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = folder / "rows.json"
    rows.write_text("\n".join(json.dumps(question) for question in QUESTIONS))
    for task in (LETTERS, WORDS):
        written = {**task, "dataset_kwargs": {"data_files": {"test": str(rows)}}}
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(written))
    monkeypatch.setenv(tasks.OWN, str(folder))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path, saved: Callable[..., Path]) -> Path:
    small = {"vocab_size": 257, "hidden_size": 16, "num_attention_heads": 2, "window": 4}
    config = ContextHybridConfig(**small, pattern="RW", intermediate_size=32)
    return saved(tmp_path / "checkpoint", config)


@torch.no_grad()
def right_answers(checkpoint: Path) -> float:
    """The share of questions whose right choice is the likeliest, each scored by itself."""
    model, tokenizer = load_checkpoint(checkpoint, "cpu")
    right = 0
    for question in QUESTIONS:
        likelihoods = []
        for choice in question["choices"]:
            first, second = (tokenizer(text)["input_ids"] for text in (question["text"], choice))
            logits = model(torch.tensor([first + second])).logits[0].log_softmax(-1)
            behind = range(len(first) - 1, len(first) + len(second) - 1)
            likelihoods.append(sum(logits[t, i] for t, i in zip(behind, second, strict=True)))
        right += max(range(3), key=lambda n: likelihoods[n]) == question["answer"]
    return right / len(QUESTIONS)


def test_a_checkpoint_is_scored_as_each_question_by_itself(
    own_tasks: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(checkpoint), "--tasks", "letters,words"]
    assert execute(app, [*command, "--json"]) == 0
    letters, words = json.loads(capsys.readouterr().out)["scores"]
    share = right_answers(checkpoint)
    assert (letters["task"], letters["metric"], letters["samples"]) == ("letters", "acc", 12)
    assert letters["value"] == pytest.approx(share)
    assert letters["stderr"] == pytest.approx((share * (1 - share) / 11) ** 0.5)
    assert (words["task"], words["metric"]) == ("words", "exact_match")
    assert 0 <= words["value"] <= 1
    assert execute(app, [*command, "--samples", "5"]) == 0
    printed = capsys.readouterr().out
    assert "letters" in printed
    assert "standard error" in printed


def test_what_cannot_be_scored_is_told_in_one_line(
    own_tasks: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def told(*options: str) -> str:
        assert execute(app, ["eval", str(checkpoint), *options]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    from lm_eval.tasks import TaskManager

    # The list of all of lm-eval's tasks takes long; these two stand for it.
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager",
        lambda include_path, include_defaults=True: TaskManager(
            include_path=include_path, include_defaults=False
        ),
    )
    assert "unknown task of lm-eval: 'leters' (did you mean 'letters'?)" in told(
        "--tasks", "leters"
    )
    assert "expected names" in told("--tasks", "letters,,words")
    assert "--tasks does not take --long" in told("--tasks", "letters", "--long")
    assert "does not take --split" in told("--tasks", "letters", "--split", "train")
    write_trained(checkpoint, TrainingNote(target_offset=2))
    assert "predicts the token 2 ahead" in told("--tasks", "letters")
    write_trained(checkpoint, TrainingNote())
    (own_tasks / "rows.json").unlink()
    assert "rows.json" in told("--tasks", "letters")
    monkeypatch.setenv(tasks.OWN, str(own_tasks / "none"))
    assert f"{tasks.OWN} " in told("--tasks", "letters")
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    assert "lm-eval is not installed" in told("--tasks", "letters")


RECIPE: dict[str, Any] = {
    "name": "scored",
    "question": "Does a task's score stand beside perplexity?",
    "tokenizer": "bpe:300",
    "sequence_length": 16,
    "samples": {"train": 8, "validation": 4},
    "training": {"epochs": 1, "batch_size": 4},
    "evaluation": {"cache_lengths": [16], "speed_tokens": 8, "tasks": ["letters"]},
    "contenders": [
        {
            "name": "base",
            "baseline": True,
            "model": {"type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1},
        }
    ],
}


def test_a_recipes_tasks_stand_in_the_report_beside_perplexity(
    own_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONTEXTLM_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{n} and {n + 1} and {n + 2}." for n in range(200)))
    file = tmp_path / "scored.yaml"
    file.write_text(yaml.safe_dump({**RECIPE, "corpus": f"text:{text}"}))
    folder = run(load_recipe(str(file)), tmp_path / "runs", device="cpu", progress=SilentProgress())
    (outcome,) = read_run(folder).outcomes
    (score,) = outcome.result.tasks
    assert (score.task, score.metric, score.samples) == ("letters", "acc", 12)
    assert score.stderr is not None
    report = (folder / "report.md").read_text("utf-8")
    table = report[report.index("Tasks of lm-eval") :]
    assert "| contender | validation PPL | letters acc | standard error |" in table
    with (own_tasks / "rows.json").open("a") as rows:  # other questions are another task
        rows.write("\n" + json.dumps(QUESTIONS[0]))
    point = Point({}, load_recipe(str(file)), "")
    with pytest.raises(InputError, match=r"evaluation\.task_files"):
        extend([point], folder, device="cpu", progress=SilentProgress())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_offset": 2}, "does not predict"),
        ({"evaluation": {"tasks": "letters"}}, "evaluation.tasks"),
        ({"unit": "answers", "corpus": "recall:4"}, "spell no text"),
    ],
)
def test_recipes_whose_models_no_task_can_ask(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**RECIPE, **changes}))
    with pytest.raises(InputError, match=message):
        load_recipe(str(file))
