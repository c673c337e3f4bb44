"""The recipes that come with the package: their sizes, their scales, what their documents propose.

And what only a recipe of lines has to say. No corpus is loaded but pydocs.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

from contextlm.base.errors import InputError
from contextlm.base.progress import SilentProgress
from contextlm.data.corpora import load_corpus
from contextlm.data.tokenizers import load_tokenizer, vocab_entries
from contextlm.data.windows import IGNORED
from contextlm.evaluation.checkpoint import load_checkpoint
from contextlm.evaluation.measure import evaluate_checkpoint
from contextlm.lab.estimate import count_parameters
from contextlm.lab.preparation import Prepared
from contextlm.lab.preparation import prepare as prepare_on
from contextlm.lab.running import run
from contextlm.models.build import build_config, check_forward, create_model, meta_model
from contextlm.recipe.loading import builtin_recipes, load_recipe, recipe_scales
from contextlm.recipe.schema import Recipe
from contextlm.results.result import read_run, seed_folder


def prepare(recipe: Recipe) -> Prepared:
    return prepare_on(recipe, torch.device("cpu"))


SCALES = [(name, scale) for name in builtin_recipes() for scale in recipe_scales(name)]

# What each model has in all and, where that is less, what phase 2 trains.
TOTALS = {
    "new-llm": {
        "transformer": 5_260_264,
        "new-llm": 3_009_768,
        "new-llm-wide-context": 3_272_168,
        "new-llm-large": 12_047_848,
        "new-llm-large-150-epochs": 12_047_848,
    },
    "context-mode": {"final-only": 41_822_168, "layerwise": 41_822_168},
    "context-kv": {"context-kv": 45_163_264},
    "dca": {
        "gpt2": 16_156_416,
        "gpt2-offset-2": 16_156_416,
        "dca": 17_144_065,
        "dca-offset-2": 17_144_065,
    },
    "context-pythia": {
        "pythia-70m": 70_426_624,
        "context-pythia": 43_570_944,
        "context-pythia-projected": 70_756_608,
    },
}
TRAINED = {
    "context-kv": {"context-kv": 6_301_440},
    "context-pythia": {"context-pythia": 43_373_568, "context-pythia-projected": 70_559_232},
}


@pytest.mark.parametrize("name", TOTALS)
def test_models_have_the_documents_sizes(name: str) -> None:
    recipe = load_recipe(name)
    counts = {count.name: count for count in count_parameters(recipe)}
    for contender, total in TOTALS[name].items():
        assert counts[contender].total == total, contender
    for contender, trained in TRAINED.get(name, {}).items():
        assert counts[contender].trainable_phase2 == trained, contender
    for contender in recipe.contenders:
        reported = contender.reported.get("parameters_total")
        assert reported in {None, counts[contender.name].total}


@pytest.mark.parametrize(("name", "scale"), SCALES)
def test_every_contender_of_every_scale_builds(name: str, scale: str) -> None:
    recipe = load_recipe(name, scale=scale)
    counts = count_parameters(recipe)
    assert [count.name for count in counts] == [c.name for c in recipe.contenders]
    assert all(count.total >= count.trainable_phase2 > 0 for count in counts)
    for contender in recipe.contenders:
        model = meta_model(build_config(contender.model, recipe.vocab_size or 1000))
        check_forward(model)
        limit = getattr(model.config, "max_position_embeddings", None)
        assert limit is None or recipe.sequence_length <= limit, contender.name


def test_dca_at_equal_sizes() -> None:
    counts = {c.name: c.total for c in count_parameters(load_recipe("dca", scale="fair"))}
    assert set(counts) == {
        *("gpt2", "dca", "gpt2-5-layers", "dca-3-layers", "dca-integrated", "dca-own-rate")
    }
    assert abs(counts["gpt2-5-layers"] / counts["dca"] - 1) < 0.02
    assert abs(counts["dca-3-layers"] / counts["gpt2"] - 1) < 0.02


def test_new_llm_is_the_documents_setting() -> None:
    recipe = load_recipe("new-llm")
    training = recipe.training
    assert (recipe.unit, recipe.tokenizer, recipe.sequence_length) == ("lines", "word:1000", 32)
    assert (training.optimizer, training.learning_rate, training.batch_size) == ("adam", 1e-4, 16)
    assert (training.epochs, training.patience, training.clip) == (50, None, 1.0)
    assert (training.schedule, training.shuffle) == ("constant", True)
    epochs = {c.name: recipe.training_of(c).epochs for c in recipe.contenders}
    assert epochs.pop("new-llm-large-150-epochs") == 150
    assert set(epochs.values()) == {50}


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("stride=3", "stride"),
        ("tokens={train: 100, validation: 50}", "tokens"),
        ("context_store={}", "context_store"),
        ("target_offset=2", "target_offset"),
        ("contenders.new-llm.target_offset=2", "contenders.new-llm.target_offset"),
        ("contenders.new-llm.phase1={}", "contenders.new-llm.phase1"),
    ],
)
def test_what_needs_a_stream_is_refused(override: str, key: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe("new-llm", overrides=[override])
    assert str(caught.value) == (
        f"recipe 'new-llm': {key}: needs a stream of text, which unit 'lines' does not have"
    )


def test_lines_where_the_recipe_has_a_stream_are_refused() -> None:
    for name in ("dca", "context-kv"):
        with pytest.raises(InputError, match="needs a stream of text"):
            load_recipe(name, overrides=["unit=lines"])
    assert load_recipe("new-llm", overrides=["target_offset=1"]).unit == "lines"


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTEXTLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CONTEXTLM_DATA", raising=False)


def scored(prepared: Prepared, split: str) -> list[int]:
    """Every target that counts, one sample after the other."""
    samples = getattr(prepared.entries["new-llm"], split)
    return [int(t) for sample in samples for t in sample["labels"] if t != IGNORED]


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("tokenizer", ["word:200", "bpe:300"])
def test_lines_are_prepared(tokenizer: str) -> None:
    recipe = load_recipe("new-llm", scale="smoke", overrides=[f"tokenizer={tokenizer}"])
    prepared = prepare(recipe)
    train, validation = scored(prepared, "train"), scored(prepared, "validation")
    facts = prepared.facts
    assert prepared.validation_bytes is None
    assert "lines split 80/20" in facts.name
    assert (facts.train_windows, facts.validation_windows) == (48, 16)
    assert (facts.train_tokens, facts.validation_tokens) == (len(train), len(validation))
    counts = Counter(train)
    share = [(counts[t] + 1) / (len(train) + facts.vocab_size) for t in validation]
    assert facts.unigram_ppl == pytest.approx(np.exp(-np.mean(np.log(share))))
    begin, end = (2, 3) if tokenizer == "word:200" else (0, 0)
    for config in (entry.config for entry in prepared.entries.values()):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (begin, end, None)
    assert prepared.entries["new-llm"].train[0]["input_ids"][0] == begin


@pytest.mark.usefixtures("own_cache")
def test_lines_from_recipe_to_report(tmp_path: Path) -> None:
    left_out = ("new-llm-wide-context", "new-llm-large", "new-llm-large-150-epochs")
    overrides = [f"contenders.{name}=null" for name in left_out]
    recipe = load_recipe("new-llm", scale="smoke", overrides=overrides)
    done = read_run(run(recipe, tmp_path, device="cpu", progress=SilentProgress()))
    assert (done.folder / "report.md").is_file()
    assert [outcome.result.contender for outcome in done.outcomes] == ["transformer", "new-llm"]
    for outcome in done.outcomes:
        result = outcome.result
        assert result.bits_per_byte is None
        assert [entry.tokens for entry in result.cache] == [8, 16, 32]
        folder = seed_folder(done.folder, result.contender, 0) / "checkpoint"
        model, tokenizer = load_checkpoint(folder, "cpu")
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (2, 3)
        assert (model.config.bos_token_id, model.config.eos_token_id) == (2, 3)
        # What was reported is the mean over the real targets of the saved weights.
        prepared = prepare(recipe)
        losses = []
        for sample in prepared.entries[result.contender].validation:
            real = sample["labels"] != IGNORED
            with torch.no_grad():
                logits = model(sample["input_ids"][real][None]).logits[0]
            losses += F.cross_entropy(logits, sample["labels"][real], reduction="none").tolist()
        assert result.validation_loss == pytest.approx(np.mean(losses), abs=1e-5)


@pytest.mark.usefixtures("own_cache")
def test_what_a_recipe_says_of_validation_and_repetition(tmp_path: Path) -> None:
    for name, count in (("mine", 12), ("theirs", 2)):
        (tmp_path / name).mkdir()
        for n in range(count):
            (tmp_path / name / f"{n}.txt").write_text(f"words {n % 9} of {name} " * 100)
    (tmp_path / "theirs" / "copy.txt").write_text(("WORDS 3  of mine " * 100).strip())
    text = [f"corpus=text:{tmp_path / 'mine'}", "unit=windows", "samples=null", "tokenizer=bpe:300"]
    text.append("documents=null")
    own = prepare(load_recipe("new-llm", scale="smoke", overrides=text)).facts
    assert (own.repeated_documents, own.validation_documents_in_training) == (3, 0)
    share = [*text, "validation=0.5"]
    half = prepare(load_recipe("new-llm", scale="smoke", overrides=share)).facts
    assert 0.3 < half.validation_tokens / (half.train_tokens + half.validation_tokens) < 0.7
    theirs = [*text, f"validation=text:{tmp_path / 'theirs'}"]
    facts = prepare(load_recipe("new-llm", scale="smoke", overrides=theirs)).facts
    assert facts.name == "text:mine, validation text:theirs"
    assert (facts.repeated_documents, facts.validation_documents_in_training) == (4, 1)
    assert facts.repetition() == (
        "text:mine, validation text:theirs: 4 documents repeat an earlier one; 1 of the validation "
        "documents is in the training text."
    )


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("spec", ["word:60", "bpe:300"])
def test_a_checkpoint_with_unknown_words_has_no_bits_per_byte(tmp_path: Path, spec: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words of a text, " * 200)
    tokenizer: PreTrainedTokenizerFast = load_tokenizer(spec, load_corpus(f"text:{text}"), tmp_path)
    folder = tmp_path / "checkpoint"
    tokenizer.save_pretrained(folder)
    config = build_config(
        {"type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 16},
        vocab_entries(tokenizer),
    )
    create_model(config, 0).save_pretrained(folder)
    report = evaluate_checkpoint(
        folder,
        corpus=f"text:{text}",
        device="cpu",
        sequence_length=None,
        samples=2,
        cache_lengths=None,
    )
    assert (report.bits_per_byte is None) == (spec == "word:60")


@pytest.mark.parametrize(
    "scale", ["full", "gpt2-150m", "small", "small-mha", "small-ablations", "small-contexts"]
)
def test_the_frontiers_contenders_are_of_one_size(scale: str) -> None:
    overrides = ["vocab_size=4096"] if scale.startswith("small") else []
    recipe = load_recipe("frontier", scale=scale, overrides=overrides)
    counts = {count.name: count.total for count in count_parameters(recipe)}
    for name, total in counts.items():
        assert abs(total / counts["mha"] - 1) < 0.02, name
    if scale.startswith("small"):
        assert max(counts.values()) < 3_000_000


@pytest.mark.parametrize("scale", ["full", "small"])
@pytest.mark.parametrize("name", ["recall", "passkey"])
def test_contenders_on_synthetic_tasks_are_of_one_size(name: str, scale: str) -> None:
    counts = {c.name: c.total for c in count_parameters(load_recipe(name, scale=scale))}
    for contender, total in counts.items():
        assert abs(total / counts["mha"] - 1) < 0.02, contender


def test_a_contender_that_only_the_scale_has_can_be_left_out_and_changed() -> None:
    overrides = ["contenders.one-latent=null", "contenders.no-gates.model.window=32"]
    recipe = load_recipe("frontier", scale="small-ablations", overrides=overrides)
    assert "one-latent" not in [contender.name for contender in recipe.contenders]
    assert recipe.contender("no-gates").model["window"] == 32
    with pytest.raises(InputError, match="did you mean 'no-gates'"):
        load_recipe("frontier", scale="small-ablations", overrides=["contenders.no-gate=null"])
