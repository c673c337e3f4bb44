"""Inputs of every malformed kind: refused in one line that names the culprit, or harmless.

One table of kinds: how many are tried, what is drawn, and what is done with it.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from attempts import RECIPE, WORDS, attempt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contextlm.recipe.schema import Contender, Recipe
from contextlm.recipe.settings import PhaseOneSettings, TrainingSettings

TIMES = int(os.environ.get("CONTEXTLM_FUZZ", "1"))  # `make fuzz` tries so many times as much
# A file cannot be a folder, so every recipe ends here in the worst case, without any training.
NOWHERE = ("--out", "recipe.yaml/runs")

# --- what is drawn --------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(
    [*("../../etc", "a/b", "", " ", "x" * 5000, "\x1b[31mred", "\u202egpj", "null", "~nobody-x/a")]
)
NUMBER = (
    st.integers()
    | st.floats()
    | st.sampled_from([0, -1, 2**31, 2**63, 10**30, 10**300, 1e308, -0.0, 5e-324])
)
VALUE = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    *Recipe.model_fields,
    *Contender.model_fields,
    *TrainingSettings.model_fields,
    *PhaseOneSettings.model_fields,
    *("scales", "type"),
]
# What no dump would write: tags, aliases, other numbers, merges, broken nesting.
ODD_YAML = st.sampled_from(
    [
        *("!!python/object/apply:os.system [echo]", "!!int ''", "!!binary x", "!!set {a, b}"),
        *("&a [*a]", "{x: &a {y: *a}}", "<<: 3", "064", "1:2:3", "0x10", ".nan", "2001-01-01"),
        *("9" * 5000, "yes", "- - - a", "? [a]\n: b", "'", "*nowhere", "%YAML 9", "@x", "\t"),
        *("\ufeff", "\x07", "\x85", "--- 1\n--- 2", "a #b", "#"),
    ]
)
WORD = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        *("", "-", "--", "-x", "--no-such", "=", "\x00", "\x1b[2J", "\udcff", "x" * 5000),
        *("nan", "inf", "-1", "0", "1e400", "9" * 400, "0x10", "1,2", ",", "٣", "~nobody-x"),
        *("/dev/null", "/proc/self/mem", "..", "/", "a/../..", "no-such", "demo", "demo.yaml"),
    ]
)
# What each command takes; nothing here can succeed in training or downloading anything.
OPTIONS = {
    "run": ["--scale", "--set", "--seeds", "--device", "--out"],
    "params": ["--scale", "--set"],
    "report": ["--out", "--into"],
    "eval": ["--corpus", "--sequence-length", "--samples", "--cache-lengths", "--cache"],
    "generate": ["--prompt-file", "--max-new-tokens", "--temperature", "--top-k", "--seed"],
    "bench": ["--repeats", "--threads", "--plot"],
    "list": [],
    "no-such": [],
}
TEXT_FILE = (
    st.binary(max_size=40)
    | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.sampled_from(
        [
            *(b"", b"\n" * 50, b"a", b"\x00" * 100, WORDS.encode("utf-16"), b"\xff\xfe"),
            *("grün ".encode("latin-1") * 50, b"\xed\xa0\x80" * 10, b"\xef\xbb\xbf", b"\r" * 300),
            *(b"\x1b[31m" * 40, "\u200b\u2028\u202e".encode() * 40, b"PK\x03\x04\xff"),
        ]
    )
)
JSON_LINE = VALUE.map(lambda value: json.dumps({"text": value})) | st.sampled_from(
    [
        *('{"text": "\\ud800"}', '{"text": "\\u0000"}', '{"text": ' + "[" * 3000, "NaN", "{}"),
        *('{"text": ' + "9" * 5000 + "}", '{"messages": [{"content": null}]}', '{"messages": []}'),
        *('{"messages": {"content": "x"}}', "\ufeff{}", "{'text': 'x'}", '{"text": "fine text"}'),
    ]
)


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """A valid recipe with a few values replaced, taken out, or put where they do not belong."""
    tree = yaml.safe_load(RECIPE)
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


@st.composite
def overrides(draw: st.DrawFn) -> str:
    parts = st.lists(st.sampled_from([*KEYS, "contenders", "ours", "base", "model"]), max_size=5)
    key = draw(st.sampled_from(KEYS) | TEXT | parts.map(".".join))
    value = draw(TEXT | ODD_YAML | NUMBER.map(str) | VALUE.map(dumped))
    return f"--set={key}{draw(st.sampled_from(['=', '=', '=', '', '==']))}{value}"


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command, of whose arguments the first is not what it asks for."""
    name = draw(st.sampled_from(list(OPTIONS)))
    options = st.sampled_from([*OPTIONS[name], "--no-such", "--json"])
    rest: list[str] = []
    for _ in range(draw(st.integers(0, 3))):
        rest += [draw(options), draw(WORD)] if draw(st.booleans()) else [draw(WORD)]
    return [name, f"no-such-{draw(st.integers(0, 9))}", *rest]


Damage = tuple[str, int, bytes, Any]


def damages(*names: str) -> st.SearchStrategy[tuple[str, Damage]]:
    """A file, and what happens to it; most often one value of its JSON or YAML is replaced."""
    kinds = st.sampled_from(["value"] * 5 + ["cut", "bytes", "gone", "folder"])
    damage = st.tuples(kinds, st.integers(0, 10**6), st.binary(max_size=30), VALUE)
    return st.tuples(st.sampled_from(names), damage)


def spots(tree: Any) -> list[tuple[Any, Any]]:
    """Every container in a nest with every key of it."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = []
    for key, value in inner:
        found.append((tree, key))
        if isinstance(value, (dict, list)):
            found += spots(value)
    return found


def damage_file(file: Path, damage: Damage) -> None:
    kind, pick, data, value = damage
    whole = file.read_bytes()
    if kind == "value" and file.suffix in (".json", ".jsonl", ".yaml"):
        load, write = (
            (yaml.safe_load, dumped) if file.suffix == ".yaml" else (json.loads, json.dumps)
        )
        lines = whole.decode().splitlines() if file.suffix == ".jsonl" else [whole.decode()]
        tree = load(lines[pick % len(lines)])
        places = spots(tree)
        outer, key = places[pick % len(places)]
        outer[key] = value
        lines[pick % len(lines)] = write(tree)
        file.write_text("\n".join(lines), "utf-8", "surrogatepass")
    elif kind in ("gone", "folder"):
        file.unlink()
        if kind == "folder":
            file.mkdir()
    elif kind == "cut":
        file.write_bytes(whole[: pick % len(whole)])
    else:
        at = pick % len(whole)
        file.write_bytes(whole[:at] + data + whole[at + len(data) :])


# --- what is done with it -------------------------------------------------------------------------


def dumped(tree: Any) -> str:
    return yaml.dump(tree, Dumper=yaml.CSafeDumper, allow_unicode=True)


def write(place: Path, data: Any) -> Path:
    file = place / "recipe.yaml"
    file.write_bytes(data if isinstance(data, bytes) else dumped(data).encode("utf-8"))
    return file


def run_recipe(place: Path, trained: Path, tree: Any) -> None:
    done = attempt("run", write(place, tree), *NOWHERE, place=place, fine=False)
    assert "recipe.yaml" in done.message


def run_override(place: Path, trained: Path, override: str) -> None:
    attempt("run", write(place, RECIPE.encode()), override, *NOWHERE, place=place, fine=False)


def count_model(place: Path, trained: Path, change: tuple[int, str, Any]) -> None:
    number, key, value = change
    tree = copy.deepcopy(yaml.safe_load(RECIPE))
    tree["contenders"][number]["model"][key] = value
    attempt("params", write(place, tree), place=place)


def run_arguments(place: Path, trained: Path, arguments: list[str]) -> None:
    attempt(*arguments, place=place, fine="-h" in arguments or "--help" in arguments)


def plan(place: Path, trained: Path, drawn: tuple[str, bytes, str]) -> None:
    name, data, unit = drawn
    write(place, RECIPE.encode())
    (place / name).write_bytes(data)
    corpus = f"corpus={'jsonl' if name.endswith('jsonl') else 'text'}:{name}"
    options = ("--set", corpus, "--set", f"unit={unit}", "--set", "contenders.ours=null")
    done = attempt("run", "recipe.yaml", *options, "--dry-run", place=place)
    assert done.code == 0 or name in done.message


def report(place: Path, trained: Path, drawn: tuple[str, Damage]) -> None:
    run = place / "run-001"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("checkpoint", "*.png", "*.md"))
    try:
        damage_file(run / drawn[0], drawn[1])
        # Reading is checked and nothing is drawn: no summary goes into a missing document.
        done = attempt("report", run, "--into", "no-such.md", place=place, fine=False)
        assert "run-001" in done.message or "no-such.md" in done.message
    finally:
        shutil.rmtree(run)


def generate(place: Path, trained: Path, drawn: tuple[str, Damage]) -> None:
    folder = place / "damaged"
    shutil.copytree(trained / "base" / "seed-0" / "checkpoint", folder)
    try:
        damage_file(folder / drawn[0], drawn[1])
        arguments = ("generate", folder, "abc", "--max-new-tokens", "2", "--device", "cpu")
        done = attempt(*arguments, place=place)
        assert done.code == 0 or "damaged" in done.message
    finally:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Kind:
    examples: int
    drawn: st.SearchStrategy[Any]
    tried: Callable[[Path, Path, Any], None]


MODEL_KEYS = [
    *("type", "n_embd", "n_layer", "n_head", "n_inner", "n_positions", "vocab_size", "no_such"),
    *("hidden_size", "context_dim", "stream", "num_hidden_layers", "num_attention_heads"),
    *("attn_implementation", "dtype", "initializer_range", "rope_theta"),
]
MODEL_VALUE = NUMBER | TEXT | st.sampled_from(["bert", "llama", "mamba", "gpt_neox", "org/kernel"])
UNITS = st.sampled_from(["windows", "windows", "lines"])
SEED = "ours/seed-0"
KINDS = {
    "recipe": Kind(
        40, VALUE | st.dictionaries(st.sampled_from(KEYS), VALUE, max_size=6), run_recipe
    ),
    "mutated recipe": Kind(60, mutated(), run_recipe),
    "override": Kind(60, overrides(), run_override),
    "model": Kind(
        15, st.tuples(st.integers(0, 1), st.sampled_from(MODEL_KEYS), MODEL_VALUE), count_model
    ),
    "arguments": Kind(40, command_lines(), run_arguments),
    "text": Kind(12, st.tuples(st.just("bad.txt"), TEXT_FILE, UNITS), plan),
    "json lines": Kind(
        12,
        st.tuples(
            st.just("bad.jsonl"),
            st.lists(JSON_LINE, max_size=3).map(lambda x: "\n".join(x).encode("utf-8")),
            UNITS,
        ),
        plan,
    ),
    "run folder": Kind(
        40,
        damages(
            *("recipe.yaml", "environment.json", f"{SEED}/result.json", f"{SEED}/timings.json"),
            f"{SEED}/history.jsonl",
        ),
        report,
    ),
    "checkpoint": Kind(
        25,
        damages(
            *("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"),
            *("generation_config.json", "contextlm.json"),
        ),
        generate,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_anything_is_refused_by_name_or_harmless(place: Path, trained: Path, kind: str) -> None:
    settled = settings(
        max_examples=KINDS[kind].examples * TIMES,
        derandomize=TIMES == 1,  # the same ones each time, unless they are many
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )

    @settled
    @given(drawn=KINDS[kind].drawn)
    def one(drawn: Any) -> None:
        KINDS[kind].tried(place, trained, drawn)

    one()
