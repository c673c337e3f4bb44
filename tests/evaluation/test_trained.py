"""The note that a checkpoint keeps of its training."""

from __future__ import annotations

import pytest

from contextlm.base.errors import InputError
from contextlm.base.progress import SilentProgress
from contextlm.cli.generation import Sampling, continue_text
from contextlm.evaluation.checkpoint import evaluate_checkpoint
from contextlm.evaluation.trained import Trained, read_trained, write_trained
from contextlm.lab.experiment import run
from contextlm.recipe.loading import load_recipe
from contextlm.results.result import seed_folder


def test_a_note_is_read_back(tmp_path):
    note = Trained(target_offset=2, unit="lines", stream=True)
    write_trained(tmp_path, note)
    assert read_trained(tmp_path) == note
    assert len(note.remarks()) == 3


def test_a_checkpoint_of_another_program_has_no_note(tmp_path):
    assert read_trained(tmp_path) == Trained()
    assert Trained().remarks() == []


@pytest.mark.parametrize("text", ["", "[]", '{"target_offset": 0}', '{"unit": "words"}'])
def test_a_damaged_note_is_named(tmp_path, text):
    (tmp_path / "contextlm.json").write_text(text)
    with pytest.raises(InputError, match=r"contextlm\.json: "):
        read_trained(tmp_path)


@pytest.fixture(scope="module")
def two_ahead(tmp_path_factory):
    """A checkpoint that predicts the token after next, and its result."""
    gone = [f"contenders.{name}=null" for name in ("dca", "dca-offset-2")]
    recipe = load_recipe("dca", scale="smoke", overrides=[*gone, "training.epochs=1"])
    folder = run(recipe, tmp_path_factory.mktemp("runs"), device="cpu", progress=SilentProgress())
    return seed_folder(folder, "gpt2-offset-2", 0) / "checkpoint"


def test_evaluation_scores_what_was_trained(two_ahead):
    options = {"corpus": "pydocs", "device": "cpu", "sequence_length": 32, "samples": 4}
    report = evaluate_checkpoint(two_ahead, **options, cache_lengths=[32])
    (two_ahead / "contextlm.json").rename(two_ahead / "aside")
    plain = evaluate_checkpoint(two_ahead, **options, cache_lengths=[32])
    (two_ahead / "aside").rename(two_ahead / "contextlm.json")
    assert report.bits_per_byte is None
    assert plain.bits_per_byte is not None
    assert report.loss != plain.loss
    assert report.remarks == ["it predicts the token 2 ahead, and is scored on that"]


def test_such_a_model_cannot_write(two_ahead):
    with pytest.raises(InputError, match="predicts the token 2 ahead"):
        continue_text(two_ahead, "Return", Sampling(4), device="cpu", stream=False)


def test_a_model_of_lines_begins_with_the_start_token(two_ahead):
    (two_ahead / "contextlm.json").rename(two_ahead / "aside")
    lengths = []
    for unit in ("windows", "lines"):
        write_trained(two_ahead, Trained(unit=unit))
        made = continue_text(two_ahead, "Return", Sampling(2), device="cpu", stream=False)
        lengths.append(made.prompt_tokens)
    (two_ahead / "aside").replace(two_ahead / "contextlm.json")
    assert lengths[1] == lengths[0] + 1
