"""From a recipe to a run folder, end to end at scale smoke."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
import torch
import yaml

from contextlm.base.errors import InputError, RunError
from contextlm.base.progress import SilentProgress
from contextlm.evaluation.checkpoint import load_checkpoint
from contextlm.evaluation.measure import evaluate_checkpoint
from contextlm.lab.estimate import count_parameters, dry_run
from contextlm.lab.grid import Point
from contextlm.lab.preparation import prepare
from contextlm.lab.running import extend, run
from contextlm.recipe.loading import builtin_recipes, dump_recipe, load_recipe
from contextlm.results.result import PhaseTwoRow, StepRow, read_run, seed_folder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def demo(cache, tmp_path_factory):
    """One smoke run with two seeds, in bfloat16 autocast whatever the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTEXTLM_CACHE", str(cache))
        recipe = load_recipe(
            "demo",
            scale="smoke",
            overrides=["training.precision=bfloat16", "evaluation.long=true"],
            seeds=[0, 3],
        )
        out = tmp_path_factory.mktemp("runs")
        return read_run(run(recipe, out, device="cpu", progress=SilentProgress()))


def test_the_run_folder_holds_what_it_should(demo):
    assert demo.folder.name == "demo-001"
    top = {path.name for path in demo.folder.iterdir()}
    files = {"recipe.yaml", "environment.json", "report.md", "report.html"}
    assert top == files | {"figures"} | {
        contender["name"] for contender in demo.recipe["contenders"]
    }
    for outcome in demo.outcomes:
        place = seed_folder(demo.folder, outcome.result.contender, outcome.result.seed)
        names = {path.name for path in place.iterdir()}
        assert names == {"job.json", "history.jsonl", "result.json", "timings.json", "checkpoint"}
        assert (place / "checkpoint" / "model.safetensors").is_file()
        assert (place / "checkpoint" / "tokenizer.json").is_file()
    figures = {path.name for path in (demo.folder / "figures").iterdir()}
    names = ("curves", "frontier", "frontier-long", "positions")
    assert figures == {f"{name}.{suffix}" for name in names for suffix in ("png", "svg", "pdf")}


def test_long_texts_are_scored_where_the_cache_is_measured(demo):
    for outcome in demo.outcomes:
        result = outcome.result
        assert result.positions[-1].last == 8 * result.corpus.sequence_length
        assert sorted(result.ppl_at()) == [bucket.last for bucket in result.positions]
        longer = {tokens for tokens in result.ppl_at() if tokens >= result.corpus.sequence_length}
        assert longer == {cache.tokens for cache in result.cache}
        first, second, *_ = result.positions
        together = (first.tokens * first.loss + second.tokens * second.loss) / (
            first.tokens + second.tokens
        )
        assert result.ppl_at()[second.last] == pytest.approx(math.exp(together))


def test_every_contender_and_seed_has_a_result(demo):
    keys = [(o.result.contender, o.result.seed) for o in demo.outcomes]
    names = ["pythia", "context-pythia", "context-pythia-projected", "selective-global"]
    assert keys == [(name, seed) for name in names for seed in (0, 3)]
    for outcome in demo.outcomes:
        result = outcome.result
        assert result.precision == "bfloat16"
        epochs = [row for row in outcome.history if isinstance(row, PhaseTwoRow)]
        assert len(epochs) == result.epochs == 2
        steps = [row for row in outcome.history if isinstance(row, StepRow)]
        assert [row.step for row in steps] == list(range(1, len(steps) + 1))
        assert {row.epoch for row in steps} == {1, 2}
        assert (result.phase1 is not None) == (result.architecture == "context_pythia")
        assert result.validation_loss == pytest.approx(
            min(row.validation_loss for row in epochs), abs=1e-9
        )


def test_cache_bytes_are_those_of_float32_whatever_training_computed_in(demo):
    state = 16 * 4 + 8  # a context of 16 numbers, and the row's count of tokens
    # S: a state of 64 x 16 and 3 taps of 64 + 2 x 16 numbers; G: 3 taps of 32 + 16; two counters.
    selective = (64 * 16 + 3 * (64 + 2 * 16) + 3 * (32 + 16)) * 4 + 2 * 8
    for outcome in demo.outcomes:
        result = outcome.result
        if result.contender == "selective-global":
            for entry in result.cache:
                assert entry.logical == selective + 16 * entry.tokens * 4
                assert 0 <= entry.resident - entry.logical < 32 * 16 * 4  # room to grow
            continue
        width = {"pythia": 32, "context-pythia": 16, "context-pythia-projected": 32}
        extra = 0 if result.contender == "pythia" else state
        for entry in result.cache:
            keys_and_values = 2 * 2 * width[result.contender] * entry.tokens * 4
            assert entry.logical == entry.resident == keys_and_values + extra


def test_a_checkpoint_gives_the_figures_of_its_result(demo):
    for outcome in demo.outcomes:
        result = outcome.result
        folder = seed_folder(demo.folder, result.contender, result.seed) / "checkpoint"
        report = evaluate_checkpoint(
            folder,
            corpus="pydocs",
            device="cpu",
            sequence_length=32,
            samples=16,
            cache_lengths=[32, 128],
        )
        assert report.architecture == result.architecture
        assert report.parameters == result.parameters_total
        assert report.cache == [held for held in result.cache if held.tokens in (32, 128)]
        model, tokenizer = load_checkpoint(folder, "cpu")
        assert model.config.use_cache is True
        assert tokenizer.decode(tokenizer("naïve 🐍")["input_ids"]) == "naïve 🐍"


def test_a_checkpoint_says_what_it_is_and_how_to_load_it(demo, monkeypatch):
    for outcome in demo.outcomes[::2]:
        result = outcome.result
        folder = seed_folder(demo.folder, result.contender, result.seed) / "checkpoint"
        card = (folder / "README.md").read_text("utf-8")
        head, text = card.removeprefix("---\n").split("\n---\n")
        assert yaml.safe_load(head)["tags"] == ["contextlm", result.architecture]
        assert f"# {result.contender}\n" in text
        assert f"| validation PPL | {result.validation_ppl:.1f} |" in text
        assert f"| parameters | {result.parameters_total:,} |" in text
        assert "trained on 3,072 tokens, repeats counted" in text  # 48 windows of 32, twice
        assert ("import contextlm\n" in text) == (result.architecture != "gpt_neox")
        monkeypatch.chdir(folder)
        found: dict[str, Any] = {}
        exec(text.split("```python\n")[1].split("```")[0], found)
        assert found["model"].num_parameters() == result.parameters_total


def test_results_hold_no_times_and_the_environment_names_versions(demo):
    for outcome in demo.outcomes:
        place = seed_folder(demo.folder, outcome.result.contender, outcome.result.seed)
        assert "seconds" not in (place / "result.json").read_text()
        assert "seconds" not in (place / "history.jsonl").read_text()
    environment = json.loads((demo.folder / "environment.json").read_text())
    assert {"contextlm", "python", "packages", "cores", "device"} <= set(environment)


def test_one_recipe_gives_one_result_and_never_overwrites(demo):
    """A second run of the same recipe gets the next number, and equal figures."""
    recipe = load_recipe(str(demo.folder / "recipe.yaml"), seeds=[3])
    again = read_run(run(recipe, demo.folder.parent, device="cpu", progress=SilentProgress()))
    assert again.folder.name == "demo-002"
    first = {o.result.contender: o for o in demo.outcomes if o.result.seed == 3}
    for outcome in again.outcomes:
        same = first[outcome.result.contender]
        assert outcome.history == same.history
        assert outcome.result == same.result
        weights = [
            (seed_folder(r.folder, outcome.result.contender, 3) / "checkpoint/model.safetensors")
            for r in (demo, again)
        ]
        assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["corpus=text:nowhere"], "nowhere"),
        (["corpus=pydoc"], "did you mean 'pydocs'"),
        (["tokenizer=gpt3"], "gpt3"),
        (["samples.train=100000000"], "pydocs"),
        (["contenders.pythia.model.num_attention_heads=5"], "contenders.pythia"),
        (["contenders.pythia.model.hiden_size=5"], "did you mean 'hidden_size'"),
        (["contenders.pythia.model.max_position_embeddings=8"], "8 positions"),
        (["contenders.pythia.phase1={}"], "context block"),
        (["vocab_size=100"], "vocab_size 100"),
        (["contenders.pythia.model.vocab_size=100"], "vocab_size 100"),
        (["contenders.context-pythia.model.tie_word_embeddings=true"], "contenders.context-pythia"),
        (["training.parameter_groups=[{match: nothing}]"], "'nothing' matches no"),
        (["training.drop_last=true", "training.batch_size=50"], "do not make one batch of 50"),
    ],
)
def test_nothing_is_written_before_all_is_known_to_be_good(tmp_path, overrides, message):
    recipe = load_recipe("demo", scale="smoke", overrides=overrides)
    with pytest.raises(InputError) as caught:
        run(recipe, tmp_path / "runs", device="cpu", progress=SilentProgress())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_recipe_has_its_scales_and_can_be_counted(name):
    for scale in ("smoke", "small", "full"):
        recipe = load_recipe(name, scale=scale)
        counts = count_parameters(recipe)
        assert [c.name for c in counts] == [c.name for c in recipe.contenders]
        assert all(c.total >= c.trainable >= c.trainable_phase2 > 0 for c in counts)


def test_the_documents_counts_at_full_scale():
    counts = {c.name: c for c in count_parameters(load_recipe("context-pythia"))}
    assert counts["pythia-70m"].total == 70_426_624
    assert counts["context-pythia"].total == 43_570_944
    assert counts["context-pythia-projected"].total == 70_756_608
    assert counts["context-pythia-projected"].trainable == 70_559_232
    assert counts["context-pythia-projected"].trainable_phase2 == 70_559_232


def test_the_full_scale_is_the_documents_setting():
    recipe = load_recipe("context-pythia")
    training = recipe.training
    assert (recipe.corpus, recipe.tokenizer, recipe.vocab_size) == ("pile", "pythia", 50304)
    assert (recipe.sequence_length, recipe.stride, recipe.target_offset) == (128, 129, 1)
    assert (recipe.samples.train, recipe.samples.validation) == (9000, 1000)
    assert (training.optimizer, training.learning_rate, training.weight_decay) == (
        "adamw",
        1e-4,
        0.01,
    )
    assert (training.batch_size, training.epochs, training.patience) == (32, 10, 1)
    assert (training.schedule, training.clip, training.precision) == ("constant", None, "float32")
    phase1 = recipe.contenders[1].phase1
    assert (phase1.learning_rate, phase1.noise, phase1.max_iterations) == (0.003, 0.05, 100)


def test_a_dry_run_counts_operations_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cost = dry_run(load_recipe("demo", scale="smoke"), device="cpu")
    assert cost.train_tokens == 48 * 32 + 1
    pythia = cost.contenders[0]
    # Two layers and the head; two operations per weight and token, attention scores and values.
    weights = 2 * (3 * 32 * 32 + 32 * 32 + 2 * 32 * 64) + 32 * 512
    attention = 2 * 2 * 32 * 32
    forward = 2 * (weights + attention)
    assert pythia.flops == pytest.approx(3 * forward * pythia.tokens_per_epoch * 2, rel=0.02)
    assert pythia.seconds_estimate > 0
    assert pythia.steps == 2 * 48 / 8
    assert list(tmp_path.iterdir()) == []


def test_windows_of_all_contenders_cover_the_same_text():
    overrides = ["contenders.context-pythia.target_offset=2"]
    prepared = prepare(load_recipe("demo", scale="smoke", overrides=overrides), CPU)
    assert set(prepared.entries) == {
        "pythia",
        "context-pythia",
        "context-pythia-projected",
        "selective-global",
    }
    names = ("context-pythia", "context-pythia-projected")
    two, one = (prepared.entries[name].train for name in names)
    assert (one.target_offset, two.target_offset) == (1, 2)
    assert len(one) == len(two) == 48
    assert (one[7]["input_ids"] == two[7]["input_ids"]).all()
    assert (one[7]["labels"][1:] == two[7]["labels"][:-1]).all()
    assert one.tokens_covered == two.tokens_covered == len(prepared.stream) == 48 * 32 + 1


def test_the_resolved_recipe_can_be_run_again(demo):
    text = (demo.folder / "recipe.yaml").read_text()
    assert yaml.safe_load(text)["name"] == "demo"
    assert load_recipe(str(demo.folder / "recipe.yaml")).contenders[0].name == "pythia"


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_resolved_recipe_can_be_run_again(tmp_path, name):
    for scale in ("smoke", "small", "full"):
        recipe = load_recipe(name, scale=scale)
        (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), "utf-8")
        assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


BASELINES = """
name: baselines
question: Do transformers' own models run as contenders?
corpus: pydocs
tokenizer: bpe:512
sequence_length: 32
documents: {train: 12, validation: 6}
samples: {train: 16, validation: 8}
training: {batch_size: 8, epochs: 1}
evaluation: {cache_lengths: [32, 64, 128], speed_tokens: 32}
contenders:
  - name: llama
    baseline: true
    model: &llama
      type: llama
      hidden_size: 32
      num_hidden_layers: 1
      num_attention_heads: 4
      num_key_value_heads: 4
      intermediate_size: 64
  - {name: llama-grouped, model: {<<: *llama, num_key_value_heads: 1}}
  - {name: gpt2, model: {type: gpt2, n_embd: 32, n_layer: 1, n_head: 4, n_positions: 64}}
"""


def test_transformers_own_models_are_contenders(tmp_path):
    (tmp_path / "baselines.yaml").write_text(BASELINES, "utf-8")
    recipe = load_recipe(str(tmp_path / "baselines.yaml"))
    outcomes = read_run(run(recipe, tmp_path, device="cpu", progress=SilentProgress())).outcomes
    cache = {o.result.contender: {e.tokens: e.logical for e in o.result.cache} for o in outcomes}
    full = 2 * 32 * 4  # bytes a token: keys and values of one layer
    assert cache["llama"] == {tokens: tokens * full for tokens in (32, 64, 128)}
    assert cache["llama-grouped"] == {tokens: tokens * full // 4 for tokens in (32, 64, 128)}
    assert cache["gpt2"] == {tokens: tokens * full for tokens in (32, 64)}


def test_one_contender_that_diverges_does_not_end_the_others(tmp_path):
    """A rate of 1e30 gives an infinite loss; the others are trained, and the report is made."""
    overrides = [
        "contenders.context-pythia.training.learning_rate=1e30",
        "contenders.context-pythia-projected=null",
        "training.precision=float32",
    ]
    recipe = load_recipe("demo", scale="smoke", overrides=overrides)
    lines = []
    progress = SilentProgress()
    progress.line = lines.append
    done = read_run(run(recipe, tmp_path, device="cpu", progress=progress))
    results = {o.result.contender: o.result for o in done.outcomes}
    assert list(results) == ["pythia", "context-pythia", "selective-global"]
    assert [name for name, result in results.items() if result.diverged] == ["context-pythia"]
    assert "loss is" in results["context-pythia"].diverged
    assert math.isinf(results["context-pythia"].validation_loss)
    assert any(line.startswith("diverged: ") for line in lines)
    assert "diverged" in (done.folder / "report.md").read_text("utf-8")
    assert list(tmp_path.rglob("checkpoint-*")) == []
    # It is a result: the same again would end the same way.
    before = (done.folder / "context-pythia/seed-0/result.json").stat().st_mtime_ns
    extend([Point({}, recipe, "")], done.folder, device="cpu", progress=SilentProgress())
    assert (done.folder / "context-pythia/seed-0/result.json").stat().st_mtime_ns == before


def test_a_run_in_which_all_diverge_fails(tmp_path):
    overrides = ["training.learning_rate=1e30", "training.precision=float32"]
    recipe = load_recipe("demo", scale="smoke", overrides=overrides)
    with pytest.raises(RunError, match="every training diverged, the first: the training loss is"):
        run(recipe, tmp_path, device="cpu", progress=SilentProgress())
    assert list(tmp_path.rglob("checkpoint-*")) == []


def test_a_contender_that_diverges_at_every_rate_of_tuning_does_not_end_the_others(toy, tmp_path):
    rate = "contenders.ours.training.clip=null"
    tuning = "tuning={learning_rates: [1e30, 1e31], share: 0.5, extensions: 0}"
    both = load_recipe(toy, overrides=[tuning, rate, "contenders.base=null", BASELINE])
    with pytest.raises(RunError, match=r"every training diverged.*at every learning rate"):
        run(both, tmp_path, **QUIETLY)
    (outcome,) = read_run(tmp_path / "toy-001").outcomes
    assert "every learning rate of tuning" in outcome.result.diverged


def test_what_is_trained_on_does_not_depend_on_the_other_contenders(toy):
    """49 windows for the token after next, 50 for the next: the text is the same."""
    limits = ["tokens={train: 801, validation: 321}", "samples=null", "documents=null"]
    ahead = [*limits, "target_offset=2"]
    alone = prepare(load_recipe(toy, overrides=ahead), CPU)
    mixed = [*ahead, "contenders.ours.target_offset=1"]
    beside = prepare(load_recipe(toy, overrides=mixed), CPU)
    assert [len(entry.train) for entry in alone.entries.values()] == [49, 49]
    assert [len(entry.train) for entry in beside.entries.values()] == [49, 50]
    assert alone.fingerprint == beside.fingerprint
    assert len(alone.stream) == 801


BASELINE = "contenders.ours.baseline=true"


def test_a_finished_run_gets_a_contender_and_seeds_more(toy, tmp_path):
    """Only what is missing is trained; the late contender is compared with the same baseline."""
    two = load_recipe(toy)
    folder = run(two, tmp_path, device="cpu", progress=SilentProgress())
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    assert len(before) == 2
    third = "contenders.late={model: {type: gpt2, n_embd: 16, n_layer: 2, n_head: 2}}"
    # It names neither `ours` nor its seed: both stay.
    recipe = load_recipe(toy, overrides=[third, "contenders.ours=null"], seeds=[1, 2])
    extend([Point({}, recipe, "")], folder, device="cpu", progress=SilentProgress())
    done = read_run(folder)
    keys = [(o.result.contender, o.result.seed) for o in done.outcomes]
    assert keys == [(name, seed) for name in ("base", "ours", "late") for seed in (0, 1, 2)]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert load_recipe(str(folder / "recipe.yaml")).seeds == [0, 1, 2]
    assert not (folder / "_working").exists()
    report = (folder / "report.md").read_text("utf-8")
    assert "late" in report
    whole = run(load_recipe(str(folder / "recipe.yaml")), tmp_path, **QUIETLY)
    for outcome, other in zip(done.outcomes, read_run(whole).outcomes, strict=True):
        assert outcome.result == other.result

    changed = load_recipe(toy, overrides=["training.epochs=2"], seeds=[0, 1, 2, 3])
    contents = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError) as caught:
        extend([Point({}, changed, "")], folder, device="cpu", progress=SilentProgress())
    assert "base, seed 0: " in str(caught.value)
    assert "training.epochs differs" in str(caught.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == contents
    for override, message in (
        ("contenders.ours.baseline=true", "its baseline is base, and the recipe's is ours"),
        ("name=other", "is a run of toy, not of other"),
    ):
        more = [override, *(["contenders.base.baseline=false"] if "ours" in override else [])]
        with pytest.raises(InputError, match=message):
            extend([Point({}, load_recipe(toy, overrides=more), "")], folder, **QUIETLY)


QUIETLY = {"device": "cpu", "progress": SilentProgress()}
QUICK = [
    "training.epochs=1",
    "training.precision=float32",
    "evaluation.cache_lengths=[32]",
    "embedding.source=random",
]


def stored(*overrides: str):
    """Recipe context-mode at scale smoke: two contenders that differ in what their layers read."""
    return load_recipe("context-mode", scale="smoke", overrides=[*QUICK, *overrides])


def finish(recipe, out):
    return read_run(run(recipe, out, device="cpu", progress=SilentProgress()))


def stores_of(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*.bin"))


def test_results_tell_of_stores_and_embeddings(tmp_path):
    done = finish(stored("context_store={fill: parallel, dtype: bfloat16}"), tmp_path)
    assert len(done.outcomes) == 2
    for outcome in done.outcomes:
        result = outcome.result
        assert result.embedding.model_dump(exclude_none=True) == {
            "source": "random",
            "frozen": True,
        }
        store = result.store
        assert (store.fill, store.dtype) == ("parallel", "bfloat16")
        assert store.train_bytes == result.corpus.train_tokens * 16 * 2 == 3000 * 16 * 2
        assert store.validation_bytes == result.corpus.validation_tokens * 16 * 2 == 700 * 16 * 2
        assert store.drift_train > 0
        assert store.drift_validation > 0
        assert result.corpus.train_windows == 12  # 11 whole ones of 256, and the rest
        assert result.phase1.context_dim == 16
        assert outcome.timings.store_seconds > 0
        stages = [stage.stage for stage in outcome.timings.stages]
        assert stages == [
            "data loaded",
            "model initialised",
            "after phase 1",
            "phase 2 prepared",
            "trained",
        ]
        written = (seed_folder(done.folder, result.contender, 0) / "result.json").read_text("utf-8")
        assert set(json.loads(written)["store"]) == {
            "fill",
            "dtype",
            "train_bytes",
            "validation_bytes",
            "drift_train",
            "drift_validation",
        }


def test_stores_are_removed_after_the_run(tmp_path):
    done = finish(stored(), tmp_path)
    assert stores_of(done.folder) == []
    folders = {path.name for path in done.folder.iterdir() if path.is_dir()}
    assert folders == {"final-only", "layerwise", "figures"}


def test_contenders_with_the_same_block_share_a_store_that_may_be_kept(tmp_path):
    done = finish(stored("context_store.keep=true", "seeds=[0, 1]"), tmp_path)
    files = stores_of(done.folder)
    assert len(files) == 2 * 2  # a split each, for each seed, and not for each contender
    sizes = sorted((done.folder / file).stat().st_size for file in files)
    assert sizes == [700 * 16 * 4] * 2 + [3000 * 16 * 4] * 2
    facts = {}
    for outcome in done.outcomes:
        facts.setdefault(outcome.result.seed, []).append(outcome.result.store)
    assert all(one == other for one, other in facts.values())
    assert facts[0] != facts[1]


def test_no_contender_loses_its_folder_with_the_stores(tmp_path):
    text = (
        yaml.safe_dump(stored().model_dump(mode="json", exclude={"scale"}))
        .replace("name: layerwise", "name: contexts")
        .replace("name: final-only", "name: embedding")
    )
    (tmp_path / "names.yaml").write_text(text, "utf-8")
    overrides = ["embedding=learned", "training.optimizer=adamw"]
    recipe = load_recipe(str(tmp_path / "names.yaml"), overrides=overrides)
    done = finish(recipe, tmp_path)
    assert [o.result.contender for o in done.outcomes] == ["embedding", "contexts"]
    for name in ("embedding", "contexts"):
        assert (done.folder / name / "seed-0" / "checkpoint" / "model.safetensors").is_file()


def test_a_contender_may_do_without_the_store(tmp_path):
    done = finish(stored("contenders.layerwise.use_store=false"), tmp_path)
    results = {o.result.contender: o.result for o in done.outcomes}
    timings = {o.result.contender: o.timings for o in done.outcomes}
    assert results["final-only"].store is not None
    assert results["layerwise"].store is None
    assert timings["layerwise"].store_seconds is None
    assert results["layerwise"].phase1 is not None
    # One block and one text, but contexts that are never reset, or start from zero each window.
    assert results["layerwise"].corpus == results["final-only"].corpus
    ranks = [results[name].phase1.effective_rank_validation for name in results]
    assert ranks[0] != ranks[1]


def test_a_stored_runs_checkpoint_gives_its_figures_over_the_whole_stream(tmp_path):
    """What phase 2 read from the store is what the checkpoint computes by the recurrence."""
    recipe = stored("context_store.fill=sequential")
    done = finish(recipe, tmp_path)
    prepared = prepare(recipe, CPU)
    tokens = torch.from_numpy(prepared.validation_stream.astype("int64")).unsqueeze(0)
    for outcome in done.outcomes:
        folder = seed_folder(done.folder, outcome.result.contender, 0) / "checkpoint"
        model, _ = load_checkpoint(folder, "cpu")
        with torch.no_grad():
            logits = model(tokens[:, :-1]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).item()
        assert outcome.result.validation_loss == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("freeze_embedding=false", "embed_tokens.weight learns in phase 2"),
        ("freeze_context=false", "context_block.layers.0.update.weight learns in phase 2"),
    ],
)
def test_a_store_needs_what_the_contexts_depend_on_frozen(tmp_path, override, key):
    recipe = stored(f"contenders.layerwise.model.{override}")
    with pytest.raises(InputError) as caught:
        run(recipe, tmp_path / "runs", device="cpu", progress=SilentProgress())
    message = str(caught.value)
    assert message.startswith("contenders.layerwise: context_store: ")
    assert key in message
    assert "use_store" in message
    assert not (tmp_path / "runs").exists()
    # Either remedy that the message names is one.
    remedy = "contenders.layerwise.use_store=false"
    prepare(stored(f"contenders.layerwise.model.{override}", remedy), CPU)


def test_bits_per_byte_are_for_the_next_token_only(tmp_path):
    overrides = [
        *QUICK,
        "contenders.context-pythia=null",
        "contenders.selective-global=null",
        "contenders.context-pythia-projected.target_offset=2",
        "contenders.context-pythia-projected.phase1.max_iterations=2",
    ]
    done = finish(load_recipe("demo", scale="smoke", overrides=overrides), tmp_path)
    one, two = (outcome.result for outcome in done.outcomes)
    assert (one.target_offset, two.target_offset) == (1, 2)
    prepared = prepare(load_recipe("demo", scale="smoke", overrides=overrides), CPU)
    bits = one.validation_loss / math.log(2) * len(prepared.validation_stream)
    assert one.bits_per_byte == pytest.approx(bits / prepared.validation_bytes, rel=1e-12)
    assert two.bits_per_byte is None


def test_unigram_perplexity_equals_a_count():
    prepared = prepare(load_recipe("demo", scale="smoke"), CPU)
    seen = Counter(prepared.stream.tolist())
    total = len(prepared.stream) + 512  # every entry counts once more
    losses = [-math.log((seen[token] + 1) / total) for token in prepared.validation_stream.tolist()]
    expected = math.exp(math.fsum(losses) / len(losses))
    assert prepared.facts.unigram_ppl == pytest.approx(expected, rel=1e-9)
