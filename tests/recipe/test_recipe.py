"""Recipes: reading, merging, and that a malformed one ends in one line that names the culprit."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from contextlm.base.errors import InputError
from contextlm.recipe.loading import builtin_recipes, dump_recipe, load_recipe, recipe_scales
from contextlm.recipe.schema import Recipe

RECIPE = """
name: toy
question: Does it work?
tokenizer: bpe:256
sequence_length: 32
samples: {train: 20, validation: 4}
seeds: [0, 1]
training: {learning_rate: 1e-3, betas: [0.8, 0.95], epochs: 3}
contenders:
  - name: base
    baseline: true
    model: {type: gpt2, n_embd: 16, n_layer: 2}
    reported: {val_ppl: 10.5}
  - name: ours
    model: {type: context_pythia, rope_theta: 1e4}
    phase1: {noise: 0.05}
    training: {learning_rate: 5e-4}
scales:
  small: {sequence_length: 16, training: {epochs: 2}}
  smoke:
    samples: {train: 4, validation: 2}
    contenders: {base: {model: {n_layer: 1}}, ours: {phase1: {max_iterations: 2}}}
  alone: {contenders: {ours: null}}
  more: {contenders: {third: {model: {type: llama}}}}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(RECIPE, "utf-8")
    return path


def load(path: Path, *overrides: str, scale: str | None = None) -> Recipe:
    return load_recipe(str(path), scale=scale, overrides=overrides)


def problem(path: Path, *overrides: str, scale: str | None = None) -> str:
    """The error's message, which must be one line."""
    with pytest.raises(InputError) as caught:
        load(path, *overrides, scale=scale)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def changed(path: Path, old: str, new: str) -> Path:
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")
    return path


def test_full_is_the_top_level(recipe_file: Path) -> None:
    recipe = load(recipe_file)
    assert recipe == load(recipe_file, scale="full")
    assert (recipe.scale, recipe.sequence_length, recipe.training.epochs) == ("full", 32, 3)
    assert recipe.training.learning_rate == 1e-3
    assert recipe.training.betas == (0.8, 0.95)
    assert recipe.baseline.name == "base"


def test_a_scale_merges_deeply_and_leaves_the_rest(recipe_file: Path) -> None:
    recipe = load(recipe_file, scale="small")
    assert (recipe.scale, recipe.sequence_length, recipe.training.epochs) == ("small", 16, 2)
    assert recipe.training.learning_rate == 1e-3


def test_a_scale_addresses_contenders_by_name(recipe_file: Path) -> None:
    base, ours = load(recipe_file, scale="smoke").contenders
    assert base.model == {"type": "gpt2", "n_embd": 16, "n_layer": 1}
    assert base.baseline
    assert ours.phase1 is not None
    assert (ours.phase1.noise, ours.phase1.max_iterations) == (0.05, 2)


def test_a_scale_may_leave_out_or_add_a_contender(recipe_file: Path) -> None:
    assert [c.name for c in load(recipe_file, scale="alone").contenders] == ["base"]
    assert [c.name for c in load(recipe_file, scale="more").contenders] == ["base", "ours", "third"]


def test_set_applies_after_the_scale_and_in_order(recipe_file: Path) -> None:
    recipe = load(recipe_file, "sequence_length=8", "sequence_length=9", scale="small")
    assert recipe.sequence_length == 9
    recipe = load(recipe_file, "question=is it #2", "training.learning_rate=3e-4", "seeds=[5]")
    assert (recipe.question, recipe.training.learning_rate) == ("is it #2", 3e-4)
    assert recipe.seeds == [5]


def test_set_reaches_a_contenders_model_with_numbers_as_numbers(recipe_file: Path) -> None:
    ours = load(recipe_file, "contenders.ours.model.rope_theta=1e6").contenders[1]
    assert ours.model["rope_theta"] == 1e6
    assert ours.model["type"] == "context_pythia"


def test_a_contenders_training_overrides_the_recipes(recipe_file: Path) -> None:
    recipe = load(recipe_file)
    base, ours = (recipe.training_of(contender) for contender in recipe.contenders)
    assert (base.learning_rate, ours.learning_rate) == (1e-3, 5e-4)
    assert ours.epochs == base.epochs == 3
    assert ours.betas == (0.8, 0.95)


def test_target_offset_falls_back_to_the_recipes(recipe_file: Path) -> None:
    recipe = load(recipe_file, "target_offset=2", "contenders.ours.target_offset=1")
    assert [recipe.target_offset_of(contender) for contender in recipe.contenders] == [2, 1]


def test_scales_are_listed(recipe_file: Path) -> None:
    assert recipe_scales(str(recipe_file)) == ["small", "smoke", "alone", "more", "full"]


@pytest.mark.parametrize(
    ("override", "culprits"),
    [
        ("trainig.epochs=2", ["'trainig'", "'training'"]),
        ("training.lerning_rate=1", ["'training.lerning_rate'", "'training.learning_rate'"]),
        ("contenders.ours.modle.x=1", ["'contenders.ours.modle'", "'contenders.ours.model'"]),
        ("contenders.our.model.x=1", ["'our'", "'ours'"]),
        ("contenders.ours=3", ["contenders.ours", "mapping"]),
        ("contenders.ours.name=base", ["'base'", "twice"]),
        ("contenders.ours.baseline=true", ["exactly one", "baseline"]),
        ("contenders.base.model.type=3", ["contenders.base", "type"]),
        ("training.epochs=true", ["training.epochs", "integer", "got True"]),
        ("training.learning_rate=.inf", ["training.learning_rate", "finite"]),
        ("training.betas=[0.9, 1.5]", ["training.betas.1", "less than 1"]),
        ("seeds=[1, 1]", ["seeds", "twice"]),
        ("name=a/b", ["name", "'a/b'"]),
        ("scale=smoke", ["scale", "--scale"]),
        ("nokey", ["'nokey'", "key=value"]),
        ("corpus=[", ["--set 'corpus=['", "YAML"]),
        ("sequence_length=064", ["--set", "'064'", "such as 64"]),
        *[
            (f"validation={v}", ["validation: expected a share"])
            for v in ("0.0", "1", "-1", "notes")
        ],
        ("learning_rate=1", ["'learning_rate'", "did you mean 'training.learning_rate'?"]),
        ("max_iterations=3", ["did you mean 'contenders.NAME.phase1.max_iterations'?"]),
        ("contenders.ours.epochs=3", ["did you mean 'contenders.ours.training.epochs'?"]),
        ("corpus=text:", ["corpus: expected text:PATH, PATH is missing"]),
        ("corpus=jsonl: x", ["corpus: expected jsonl:PATH, no space may follow the colon"]),
        ("contenders.ours.phase1=x", ["contenders.ours.phase1: expected a mapping, got 'x'"]),
        ("contenders.a b={model: {type: gpt2}}", ["only letters, digits, '-' and '_' are allowed"]),
        ("contenders.ours.model.x=!!binary aGk=", ["contenders.ours.model.x", "JSON"]),
    ],
)
def test_a_wrong_value_is_named(recipe_file: Path, override: str, culprits: list[str]) -> None:
    message = problem(recipe_file, override)
    for culprit in culprits:
        assert culprit in message


def test_a_missing_file_or_a_folder_is_said_to_be_one(tmp_path: Path, recipe_file: Path) -> None:
    assert f"did you mean {str(recipe_file)!r}?" in problem(tmp_path / "toy.yml")
    assert problem(tmp_path / "else.yaml") == f"{tmp_path / 'else.yaml'}: no such file"
    assert problem(tmp_path) == f"{tmp_path}: is a folder, not a recipe"


def test_an_unknown_scale_is_named_with_the_nearest(recipe_file: Path) -> None:
    message = problem(recipe_file, scale="smok")
    assert "'smok'" in message
    assert "'smoke'" in message


def test_an_unknown_recipe_is_named() -> None:
    with pytest.raises(InputError, match="unknown recipe 'no-such-recipe'"):
        load_recipe("no-such-recipe")


@pytest.mark.parametrize(
    ("old", "new", "culprit"),
    [
        ("  - name: ours", "  - nam: ours", "entry 2 needs a 'name'"),
        ("  - name: ours", "  - name: base", "'base' is named twice"),
        ("name: toy", "name: toy\nname: toy2", "'name' stands twice"),
        ("name: toy", "name: toy\nscale: small", "'scale' cannot be set"),
        ("scales:\n", "scales:\n  full: {}\n", "'full' is the recipe's top level"),
        ("tokenizer: bpe:256\n", "", "tokenizer: field required"),
        ("sequence_length: 32", "sequence_length: '32'", "sequence_length"),
    ],
)
def test_a_malformed_file_is_named(recipe_file: Path, old: str, new: str, culprit: str) -> None:
    message = problem(changed(recipe_file, old, new))
    assert culprit in message
    assert recipe_file.name in message


@pytest.mark.parametrize("text", ["", "- a\n", "text", "1: 2", "[[[["])
def test_what_is_no_mapping_is_no_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, "utf-8")
    assert "bad.yaml" in problem(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "missing.yaml" in problem(tmp_path / "missing.yaml")
    (tmp_path / "folder.yaml").mkdir()
    assert "folder.yaml" in problem(tmp_path / "folder.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    assert "UTF-8" in problem(tmp_path / "latin.yaml")
    with pytest.raises(InputError):
        load_recipe("null\0byte.yaml")


def test_dumping_and_loading_gives_the_same_recipe(recipe_file: Path, tmp_path: Path) -> None:
    odd = 'contenders.ours.model.note="3e-4"'
    for scale in ("full", "smoke"):
        recipe = load(recipe_file, odd, "question='2020-01-01 \u00e9'", scale=scale)
        copy = tmp_path / "resolved.yaml"
        copy.write_text(dump_recipe(recipe), "utf-8")
        assert load(copy) == recipe
        plain = yaml.safe_load(copy.read_text("utf-8"))  # other readers see the same
        assert plain.pop("resolved_from") == recipe.scale
        assert plain == recipe.model_dump(mode="json", exclude={"scale"})


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_recipe_that_is_installed_loads_at_every_scale(name: str) -> None:
    scales = recipe_scales(name)
    assert {"smoke", "small", "full"} <= set(scales)
    for scale in scales:
        recipe = load_recipe(name, scale=scale)
        assert recipe.name == name
        assert recipe.question


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.accumulation=3", "accumulation (3) must divide batch_size (16)"),
        ("training.schedule=linear", "minimum_ratio is for schedules cosine and wsd, not linear"),
        ("training={accumulation: 2, drop_last: true}", "drop_last with accumulation"),
        ("training.schedule_unit=epoch", "warmup with schedule_unit epoch"),
        ("training.optimizer=adam", "weight_decay is for optimizer adamw"),
    ],
)
def test_training_values_that_do_not_fit_together(override, message):
    with pytest.raises(InputError) as caught:
        load_recipe("demo", overrides=[override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("scale", "overrides", "departures"),
    [
        ("full", [], []),
        ("next", [], []),  # more contenders, the others as they were
        ("samples-100", [], []),  # with the document's figures for it
        ("samples-100", ["documents.train=90"], ["documents.train"]),
        ("full", ["seeds=[5]", "evaluation.batch_size=1"], []),
        ("full", ["documents.train=100", "embedding=learned"], ["documents.train", "embedding"]),
        (
            "full",
            ["contenders.context-kv.model.interval=50"],
            ["contenders.context-kv.model.interval"],
        ),
    ],
)
def test_a_recipe_knows_where_it_departs_from_its_top_level(scale, overrides, departures, tmp_path):
    recipe = load_recipe("context-kv", scale=scale, overrides=overrides)
    assert recipe.departs_from_full == departures
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe), "utf-8")
    assert load_recipe(str(file)) == recipe
    again = load_recipe(str(file), overrides=["training.epochs=3"])
    assert again.departs_from_full == sorted([*departures, "training.epochs"])


def test_an_older_resolved_recipe_does_not_know_its_departures(tmp_path):
    resolved = yaml.safe_load(dump_recipe(load_recipe("context-kv", scale="small")))
    del resolved["departs_from_full"]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(resolved), "utf-8")
    assert load_recipe(str(file)).departs_from_full is None


# --- paths ----------------------------------------------------------------------------------------


def test_a_value_on_the_command_line_has_no_comments(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load(recipe_file, f"corpus=text:{tmp_path}/notes #2")
    assert recipe.corpus == f"text:{tmp_path}/notes #2"
    changed(recipe_file, "question:", "corpus: text:notes #2\nquestion:")
    assert "a comment follows the path 'text:notes'" in problem(recipe_file)


def test_paths_are_absolute_and_kept_as_they_were_written(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tok").mkdir()
    (tmp_path / "gpt2").mkdir()  # the tokenizer of that name is not this folder
    monkeypatch.chdir(tmp_path)
    overrides = ["corpus=text:notes", "validation=jsonl:../v.jsonl", "tokenizer=tok"]
    overrides += ["embedding={source: pretrained, path: ./tok}"]
    recipe = load(recipe_file, *overrides)
    assert recipe.corpus == f"text:{tmp_path}/notes"
    assert recipe.validation == f"jsonl:{tmp_path}/../v.jsonl"
    assert (recipe.tokenizer, recipe.embedding.path) == (f"{tmp_path}/tok", f"{tmp_path}/tok")
    assert recipe.written == {
        "corpus": "text:notes",
        "validation": "jsonl:../v.jsonl",
        "tokenizer": "tok",
        "embedding.path": "./tok",
    }
    (tmp_path / "resolved.yaml").write_text(dump_recipe(recipe), "utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load(tmp_path / "resolved.yaml") == recipe
    other = load(tmp_path / "resolved.yaml", "corpus=pydocs", "tokenizer=gpt2")
    assert (other.corpus, other.tokenizer) == ("pydocs", "gpt2")
    assert set(other.written) == {"validation", "embedding.path"}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(recipe_file, "corpus=text:~/a").corpus == f"text:{tmp_path}/a"


def test_names_are_no_paths(recipe_file: Path) -> None:
    for corpus in ("pydocs", "recall:8", "wikitext-2"):
        recipe = load(recipe_file, f"corpus={corpus}", "embedding={path: org/model}")
        assert (recipe.corpus, recipe.tokenizer, recipe.written) == (corpus, "bpe:256", {})
        assert recipe.embedding.path == "org/model"
