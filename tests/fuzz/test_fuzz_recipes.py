"""Recipes of every malformed kind, and overrides: refused in one line, before torch is imported."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from attempts import EXAMPLES, attempt, tries
from hypothesis import given
from hypothesis import strategies as st

from contextlm.recipe.schema import Contender, Recipe
from contextlm.recipe.settings import PhaseOneSettings, TrainingSettings

RECIPE = """\
name: toy
question: Does it work?
corpus: text:notes.txt
tokenizer: bpe:300
sequence_length: 32
samples: {train: 4, validation: 2}
seeds: [0, 1]
training: {learning_rate: 1e-3, betas: [0.8, 0.95], epochs: 3}
contenders:
  - name: base
    baseline: true
    model: {type: gpt2, n_embd: 16, n_layer: 1, n_head: 2}
    reported: {val_ppl: 10.5}
  - name: ours
    model: {type: context_pythia, num_hidden_layers: 1, hidden_size: 16, context_dim: 8}
    phase1: {noise: 0.05}
    training: {learning_rate: 5e-4}
scales:
  smoke: {samples: {train: 2, validation: 1}, contenders: {base: {model: {n_layer: 1}}}}
"""
TREE = yaml.safe_load(RECIPE)
# A file cannot be a folder, so every recipe ends here in the worst case, without any training.
NOWHERE = ("--out", "recipe.yaml/runs")

TEXT = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(
    [
        "../../etc",
        "a/b",
        "",
        " ",
        "x" * 5000,
        "\x1b[31mred",
        "\u202egpj",
        "\U0001d4b3",
        "null",
        "~nobody-x",
    ]
)
NUMBER = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 2**31, 2**63, 10**30, 10**300, 1e308, -0.0, True, 5e-324]),
)
VALUE = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
KEYS = [
    *Recipe.model_fields,
    *Contender.model_fields,
    *TrainingSettings.model_fields,
    *PhaseOneSettings.model_fields,
    "scales",
    "type",
]
# What no dump would write: tags, aliases, odd numbers, merges, deep and broken nesting.
ODD_YAML = st.sampled_from(
    [
        "!!python/object/apply:os.system [echo]",
        "!!int ''",
        "!!binary x",
        "!!set {a, b}",
        "&a [*a]",
        "{x: &a {y: *a}}",
        "&a {<<: *a}",
        "<<: 3",
        "0x" + "f" * 6000,
        "9" * 5000,
        "1:2:3",
        ".nan",
        "-.inf",
        "2001-01-01",
        "[" * 3000,
        "{a: " * 500,
        "- - - a",
        "? [a]\n: b",
        "'",
        "*nowhere",
        "%YAML 9",
        "@x",
        "\t",
        "\ufeff",
        "\x07",
        "\x85",
        "--- 1\n--- 2",
        "[&a [x,x,x,x,x,x,x,x,x], &b [*a,*a,*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b,*b,*b,*b],"
        " &d [*c,*c,*c,*c,*c,*c,*c,*c,*c], &e [*d,*d,*d,*d,*d,*d,*d,*d,*d],"
        " &f [*e,*e,*e,*e,*e,*e,*e,*e,*e], &g [*f,*f,*f,*f,*f,*f,*f,*f,*f], [*g,*g,*g,*g]]",
    ]
)


def dumped(tree: Any) -> str:
    return yaml.dump(tree, Dumper=yaml.CSafeDumper, allow_unicode=True)


def write(place: Path, text: str | bytes) -> Path:
    file = place / "recipe.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return file


@tries("recipe")
@given(tree=VALUE | st.dictionaries(st.sampled_from(KEYS), VALUE, max_size=6))
def test_any_tree_is_refused(place: Path, tree: Any) -> None:
    file = write(place, dumped(tree))
    done = attempt("run", file, *NOWHERE, place=place, fine=False)
    assert "recipe.yaml" in done.message


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """A valid recipe with a few values replaced, taken out, or put where they do not belong."""
    tree = copy.deepcopy(TREE)
    for _ in range(draw(st.integers(1, 3))):
        outer: Any = tree
        while True:
            keys = list(outer) if isinstance(outer, dict) else list(range(len(outer)))
            key = draw(st.sampled_from(keys)) if keys else None
            inner = None if key is None else outer[key]
            if not isinstance(inner, (dict, list)) or draw(st.integers(0, 2)) == 0:
                break
            outer = inner
        change = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if isinstance(outer, dict) and (change == "add" or key is None):
            outer[draw(st.sampled_from(KEYS) | TEXT)] = draw(VALUE)
        elif key is not None and change == "remove":
            del outer[key]
        elif key is not None:
            outer[key] = draw(VALUE)
    return tree


@tries("mutated recipe")
@given(tree=mutated(), scale=st.sampled_from(["full", "smoke", "smok"]))
def test_a_mutated_recipe_is_refused_by_name(place: Path, tree: Any, scale: str) -> None:
    file = write(place, dumped(tree))
    done = attempt("run", file, "--scale", scale, *NOWHERE, place=place, fine=False)
    assert "recipe.yaml" in done.message


@tries("damaged recipe")
@given(
    start=st.integers(0, len(RECIPE)),
    length=st.integers(0, 40),
    text=st.text(max_size=12).map(lambda t: t.encode("utf-8", "surrogatepass"))
    | ODD_YAML.map(str.encode)
    | st.binary(max_size=12),
)
def test_a_damaged_file_is_refused_by_name(
    place: Path, start: int, length: int, text: bytes
) -> None:
    data = RECIPE.encode()
    file = write(place, data[:start] + text + data[start + length :])
    done = attempt("run", file, *NOWHERE, place=place, fine=False)
    assert "recipe.yaml" in done.message


@tries("override")
@given(
    key=st.sampled_from(KEYS)
    | TEXT
    | st.lists(st.sampled_from([*KEYS, "contenders", "ours", "base", "model"]), max_size=5).map(
        ".".join
    ),
    value=TEXT | ODD_YAML | NUMBER.map(str) | VALUE.map(dumped),
    equals=st.sampled_from(["=", "=", "=", "", "=="]),
)
def test_any_override_is_refused(place: Path, key: str, value: str, equals: str) -> None:
    file = write(place, RECIPE)
    given_text = f"--set={key}{equals}{value}"
    attempt("run", file, given_text, *NOWHERE, place=place, fine=False)


@tries("model")
@given(
    name=st.sampled_from(["base", "ours"]),
    key=st.sampled_from(
        [
            *("type", "n_embd", "n_layer", "n_head", "n_inner", "n_positions", "vocab_size"),
            *("hidden_size", "context_dim", "stream", "num_hidden_layers", "num_attention_heads"),
            *("attn_implementation", "dtype", "initializer_range", "rope_theta", "no_such"),
        ]
    ),
    value=NUMBER | TEXT | st.sampled_from(["bert", "llama", "mamba", "gpt_neox", "org/kernel"]),
)
def test_any_model_is_counted_or_refused(place: Path, name: str, key: str, value: Any) -> None:
    """These go on to build the models: types that do not exist, sizes that fit nothing."""
    tree = copy.deepcopy(TREE)
    model = next(c["model"] for c in tree["contenders"] if c["name"] == name)
    model[key] = value
    file = write(place, dumped(tree))
    attempt("params", file, place=place)


@pytest.mark.parametrize("end", ["\r\n", "\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_a_recipe_that_is_merely_unusual_works(place: Path, start: str, end: str) -> None:
    file = write(place, (start + RECIPE).replace("\n", end))
    assert attempt("params", file, place=place).code == 0


def test_there_are_enough_inputs() -> None:
    assert sum(EXAMPLES.values()) >= 2000
