"""The embeddings that contenders start from: another model's, or learned beforehand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, T5Config

from contextlm.base.errors import InputError, RunError
from contextlm.base.progress import SilentProgress
from contextlm.lab import embeddings
from contextlm.lab.embeddings import (
    LearningText,
    check_learning_text,
    learn_embedding,
    load_pretrained,
)
from contextlm.lab.preparation import prepare
from contextlm.lab.running import run
from contextlm.models.context_token import ContextTokenConfig, ContextTokenForCausalLM
from contextlm.recipe.loading import load_recipe
from contextlm.recipe.settings import EmbeddingSettings
from contextlm.results.facts import EmbeddingFacts
from contextlm.results.result import read_run, seed_folder

CPU = torch.device("cpu")
V, D = 20, 8


def words(size: int, first: int = 0) -> PreTrainedTokenizerFast:
    """A tokenizer whose entries are numbers."""
    vocabulary = {str(first + number): number for number in range(size)}
    model = models.WordLevel(vocabulary, unk_token=str(first))
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))


def pretrained(path: str, vocab_size: int, width: int):
    """The table at `path` for a recipe with as many words."""
    return load_pretrained(path, words(vocab_size), vocab_size, width)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr("contextlm.data.hub.hub_reachable", lambda: False)


def save_gpt2(folder, vocab_size: int = V, width: int = D) -> torch.Tensor:
    """A tiny GPT-2 in `folder`; its input embedding."""
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_embd=width,
        n_layer=1,
        n_head=2,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    return model.transformer.wte.weight.detach().clone()


def test_the_table_of_another_model(tmp_path):
    table = save_gpt2(tmp_path)
    loaded = pretrained(str(tmp_path), V, D)
    assert torch.equal(loaded.weight_VD, table)
    assert loaded.weight_VD.dtype == torch.float32
    assert not loaded.weight_VD.requires_grad
    assert loaded.facts == EmbeddingFacts(source="pretrained", path=str(tmp_path))


def test_the_table_of_a_model_of_ours(tmp_path):
    config = ContextTokenConfig(vocab_size=V, hidden_size=D, context_dim=4)
    model = ContextTokenForCausalLM(config)
    model.save_pretrained(tmp_path)
    loaded = pretrained(str(tmp_path), V, D)
    assert torch.equal(loaded.weight_VD, model.model.embed_tokens.weight)


def test_a_table_in_bfloat16_is_widened(tmp_path):
    table = save_gpt2(tmp_path)
    GPT2LMHeadModel.from_pretrained(tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = pretrained(str(tmp_path), V, D)
    assert loaded.weight_VD.dtype == torch.float32
    assert torch.equal(loaded.weight_VD, table.bfloat16().float())


def test_a_larger_vocabulary_is_cut(tmp_path):
    table = save_gpt2(tmp_path)
    loaded = pretrained(str(tmp_path), V - 3, D)
    assert torch.equal(loaded.weight_VD, table[: V - 3])
    # A view would keep the whole table in memory.
    assert loaded.weight_VD.untyped_storage().nbytes() == (V - 3) * D * 4


@pytest.mark.parametrize(("vocab_size", "width"), [(V, D + 1), (V, D // 2), (V + 1, D)])
def test_another_shape_is_refused(tmp_path, vocab_size, width):
    save_gpt2(tmp_path)
    with pytest.raises(InputError) as caught:
        pretrained(str(tmp_path), vocab_size, width)
    assert str(caught.value) == (
        f"embedding.path '{tmp_path}': its embedding is 20 x 8, "
        f"the models need {vocab_size} x {width}"
    )


def change_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **fields}), "utf-8")


def drop_embedding(folder):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "wte" not in name}
    assert len(kept) == len(weights) - 1
    safetensors.torch.save_file(kept, folder / "model.safetensors", {"format": "pt"})


def halve_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


DAMAGE = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "half the weights": halve_weights,
    "no embedding": drop_embedding,
    "broken config": lambda folder: (folder / "config.json").write_text("{"),
    "no mapping": lambda folder: (folder / "config.json").write_text("[1]"),
    "unknown type": lambda folder: change_config(folder, model_type="gpt5"),
    "a value of another type": lambda folder: change_config(folder, n_embd="wide"),
    "values that do not fit": lambda folder: change_config(folder, n_head=3),
    "another width": lambda folder: change_config(folder, n_embd=2 * D),
    "no language model": lambda folder: T5Config().save_pretrained(folder),
    "code of its own": lambda folder: change_config(
        folder, model_type="own", auto_map={"AutoConfig": "own.Config"}
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_folder_without_a_usable_model_is_refused(tmp_path, damage, monkeypatch):
    save_gpt2(tmp_path)
    damage(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked at the terminal"))
    with pytest.raises(InputError) as caught:
        pretrained(str(tmp_path), V, D)
    message = str(caught.value)
    assert message.startswith(f"embedding.path '{tmp_path}': ")
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize("path", ["./no/such/folder", "/no/such/folder", "~/no-such-folder"])
def test_a_folder_that_is_not_there_is_no_matter_of_the_hub(path):
    with pytest.raises(InputError, match="no such folder"):
        pretrained(path, V, D)


def test_the_same_words_are_wanted_not_just_the_same_shape(tmp_path):
    table = save_gpt2(tmp_path)
    words(V).save_pretrained(tmp_path)
    assert torch.equal(pretrained(str(tmp_path), V, D).weight_VD, table)
    words(V, first=1).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"another one than the recipe's: '\d+' is not entry"):
        pretrained(str(tmp_path), V, D)


def test_without_a_tokenizer_only_padding_may_be_left_over(tmp_path):
    save_gpt2(tmp_path, vocab_size=V + 513)
    with pytest.raises(InputError, match="no tokenizer, and 513 entries more"):
        pretrained(str(tmp_path), V, D)


@pytest.mark.parametrize("path", ["gpt2", "someone/some-model"])
def test_an_unreachable_hub_says_what_to_set(path):
    with pytest.raises(RunError) as caught:
        pretrained(path, V, D)
    message = str(caught.value)
    assert message.startswith(f"embedding.path '{path}': the hub (")
    assert message.endswith(
        "could not be reached; set embedding.path to a local checkpoint, or embedding=learned"
    )


def test_from_a_reachable_hub(tmp_path, monkeypatch):
    table = save_gpt2(tmp_path)
    monkeypatch.setattr("contextlm.data.hub.hub_reachable", lambda: True)
    read = embeddings.AutoModelForCausalLM.from_pretrained
    asked = []

    def deliver(path, **options):
        asked.append((path, options["local_files_only"]))
        return read(tmp_path, **options)

    monkeypatch.setattr(embeddings.AutoModelForCausalLM, "from_pretrained", deliver)
    assert torch.equal(pretrained("gpt2", V, D).weight_VD, table)
    assert asked == [("gpt2", False)]


TINY = EmbeddingSettings(
    source="learned", layers=1, sequence_length=8, batch_size=4, epochs=2, learning_rate=0.01
)


def make_text(seed: int = 0) -> LearningText:
    """Tokens of which each tells the next one, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    tokens = np.cumsum(1 + (rng.random(600) < 0.1)) % V
    return LearningText(tokens[:500].astype(np.uint16), tokens[500:].astype(np.uint16), V, D)


def learn(folder, settings=TINY, text=None, seed=0):
    settings = settings.model_copy(update={"seed": seed})
    text = check_learning_text(settings, make_text() if text is None else text)
    return learn_embedding(settings, text, CPU, folder / "work", SilentProgress())


@pytest.fixture
def no_training(monkeypatch):
    """From here on nothing may be trained."""

    def forbid():
        monkeypatch.setattr(embeddings, "train_next_token", lambda *a, **k: pytest.fail("trains"))

    return forbid


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONTEXTLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "embeddings"


def test_learned_embeddings_are_those_of_a_trained_model(tmp_path, own_cache):
    learned = learn(tmp_path)
    assert learned.weight_VD.shape == (V, D)
    assert learned.weight_VD.dtype == torch.float32
    facts = learned.facts
    assert (facts.source, facts.tokens, facts.path) == ("learned", 500, None)
    assert 1 <= facts.epochs <= 2  # the best
    assert 1 < facts.validation_ppl < V  # better than guessing
    start = embeddings.create_model(embeddings._small_gpt2(TINY, make_text()), 0)
    moved = learned.weight_VD - start.get_input_embeddings().weight
    assert moved.abs().max() > 0.01
    assert not (tmp_path / "work").exists()
    assert len(list(own_cache.iterdir())) == 1


def test_learning_is_deterministic(tmp_path, own_cache, monkeypatch):
    first = learn(tmp_path)
    monkeypatch.setenv("CONTEXTLM_CACHE", str(tmp_path / "another cache"))
    torch.manual_seed(77)
    second = learn(tmp_path)
    assert torch.equal(first.weight_VD, second.weight_VD)
    assert first.facts == second.facts


def test_what_was_learned_once_is_read_again(tmp_path, own_cache, no_training):
    first = learn(tmp_path)
    no_training()
    second = learn(tmp_path)
    assert torch.equal(first.weight_VD, second.weight_VD)
    assert first.facts == second.facts
    assert not second.weight_VD.requires_grad


def test_whatever_decides_them_gives_other_embeddings(tmp_path, own_cache):
    learn(tmp_path)
    learn(tmp_path, seed=1)
    learn(tmp_path, text=make_text(seed=1))
    learn(tmp_path, settings=TINY.model_copy(update={"epochs": 1}))
    limited = learn(tmp_path, settings=TINY.model_copy(update={"tokens": 100}))
    assert limited.facts.tokens == 100
    assert len(list(own_cache.iterdir())) == 5


def test_learning_reads_no_more_than_the_first_tokens(tmp_path, own_cache, no_training):
    settings = TINY.model_copy(update={"tokens": 200})
    text = make_text()
    other = text.train.copy()
    other[200:] = 3
    first = learn(tmp_path, settings, text)
    no_training()  # the same text as far as it counts, and so the same embeddings
    again = learn(tmp_path, settings, LearningText(other, text.validation, V, D))
    assert torch.equal(again.weight_VD, first.weight_VD)
    with pytest.raises(InputError, match=r"embedding\.tokens: 501 asked for, there are 500"):
        learn(tmp_path, TINY.model_copy(update={"tokens": 501}))


@pytest.mark.parametrize("damage", ["cut", "other", "empty", "no facts", "no tensor"])
def test_a_damaged_file_in_the_cache_is_learned_anew(tmp_path, own_cache, damage):
    first = learn(tmp_path)
    (file,) = own_cache.iterdir()
    good = file.read_bytes()
    facts = {"facts": first.facts.model_dump_json()}
    table = {"embedding": first.weight_VD}
    file.write_bytes(
        {
            "cut": good[:-40],
            "other": b"not a safetensors file",
            "empty": b"",
            "no facts": safetensors.torch.save(table),
            "no tensor": safetensors.torch.save({"other": first.weight_VD}, facts),
        }[damage]
    )
    again = learn(tmp_path)
    assert torch.equal(first.weight_VD, again.weight_VD)
    assert file.read_bytes() == good


def test_a_text_shorter_than_a_window_is_refused(tmp_path, own_cache):
    short = LearningText(make_text().train[:8], make_text().validation, V, D)
    with pytest.raises(InputError, match="sequence_length 8: the training text has only 8 tokens"):
        learn(tmp_path, text=short)


def test_a_loss_that_is_not_finite_leaves_nothing_in_the_cache(tmp_path, own_cache):
    with pytest.raises(RunError, match="loss"):
        learn(tmp_path, TINY.model_copy(update={"learning_rate": 1e30}))
    assert not own_cache.exists()
    assert not list((tmp_path / "work").glob("checkpoint*"))


# Recipes


def smoke(*overrides: str, recipe: str = "context-mode"):
    small = ["training.epochs=1", "evaluation.cache_lengths=[32]", "training.precision=float32"]
    return load_recipe(recipe, scale="smoke", overrides=[*small, *overrides])


def test_a_bare_word_is_the_source():
    shorthand = load_recipe("demo", scale="smoke", overrides=["embedding=learned"])
    spelled = load_recipe("demo", scale="smoke", overrides=["embedding={source: learned}"])
    assert shorthand.embedding == spelled.embedding == EmbeddingSettings(source="learned")
    assert load_recipe("demo", scale="smoke").embedding.source == "random"
    with pytest.raises(InputError, match="embedding"):
        load_recipe("demo", scale="smoke", overrides=["embedding=found"])


@pytest.mark.parametrize("source", ["learned", "pretrained"])
def test_contenders_of_different_widths_are_refused(tmp_path, source):
    recipe = smoke(f"embedding.source={source}", "contenders.layerwise.model.hidden_size=48")
    with pytest.raises(InputError) as caught:
        run(recipe, tmp_path / "runs", device="cpu", progress=SilentProgress())
    assert str(caught.value) == (
        "embedding: one table serves all contenders, but final-only needs 512 x 32 "
        "and layerwise 512 x 48"
    )
    assert not (tmp_path / "runs").exists()


def test_contenders_of_different_widths_may_draw_their_own():
    recipe = smoke("embedding.source=random", "contenders.layerwise.model.hidden_size=48")
    assert prepare(recipe, torch.device("cpu")).embedding is None


def test_a_pretrained_table_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    save_gpt2(tmp_path / "gpt2", vocab_size=512, width=16)
    recipe = smoke(f"embedding={{source: pretrained, path: {tmp_path / 'gpt2'}}}")
    with pytest.raises(InputError, match="is 512 x 16, the models need 512 x 32"):
        run(recipe, tmp_path / "runs", device="cpu", progress=SilentProgress())
    assert not (tmp_path / "runs").exists()


def tables(outcome_run) -> dict[str, torch.Tensor]:
    """The embedding in every contender's checkpoint."""
    found = {}
    for outcome in outcome_run.outcomes:
        result = outcome.result
        folder = seed_folder(outcome_run.folder, result.contender, result.seed) / "checkpoint"
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        found[f"{result.contender} {result.seed}"] = weights["model.embed_tokens.weight"]
    return found


def test_all_contenders_and_seeds_start_from_the_pretrained_table(tmp_path):
    table = save_gpt2(tmp_path / "gpt2", vocab_size=515, width=32)
    path = tmp_path / "gpt2"
    recipe = smoke(f"embedding={{source: pretrained, path: {path}}}", "seeds=[0, 1]")
    done = read_run(run(recipe, tmp_path, device="cpu", progress=SilentProgress()))
    found = tables(done)
    assert set(found) == {f"{name} {seed}" for name in ("final-only", "layerwise") for seed in "01"}
    for weight in found.values():
        assert torch.equal(weight, table[:512])  # frozen: as it was put in
    for outcome in done.outcomes:
        assert outcome.result.embedding == EmbeddingFacts(
            source="pretrained", path=str(path), frozen=True
        )


def test_all_contenders_start_from_the_learned_table(tmp_path, own_cache):
    recipe = smoke("embedding={source: learned, layers: 1, sequence_length: 32, batch_size: 8}")
    done = read_run(run(recipe, tmp_path, device="cpu", progress=SilentProgress()))
    (file,) = own_cache.iterdir()
    table = safetensors.torch.load_file(file)["embedding"]
    for weight in tables(done).values():
        assert torch.equal(weight, table)
    for outcome in done.outcomes:
        facts = outcome.result.embedding
        assert (facts.source, facts.tokens, facts.epochs, facts.frozen) == (
            "learned",
            3000,
            1,
            True,
        )
        assert facts.validation_ppl > 1
    assert not (done.folder / "embedding").exists()


def test_an_embedding_that_learns_is_not_called_frozen(tmp_path):
    save_gpt2(tmp_path / "gpt2", vocab_size=512, width=32)
    recipe = smoke(
        f"embedding={{source: pretrained, path: {tmp_path / 'gpt2'}}}",
        "contenders.context-pythia-projected=null",
        "contenders.selective-global=null",
        "contenders.context-pythia.phase1.max_iterations=2",
        "training.learning_rate=1.0e-9",
        recipe="demo",
    )
    done = read_run(run(recipe, tmp_path, device="cpu", progress=SilentProgress()))
    table = pretrained(str(tmp_path / "gpt2"), 512, 32).weight_VD
    for outcome in done.outcomes:
        assert outcome.result.embedding.source == "pretrained"
        assert not outcome.result.embedding.frozen
        folder = seed_folder(done.folder, outcome.result.contender, 0) / "checkpoint"
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        (started,) = [
            w
            for name, w in weights.items()
            if name.endswith(("embed_in.weight", "embed_tokens.weight"))
        ]
        torch.testing.assert_close(started, table, rtol=0, atol=1e-6)
