"""The command line: what it prints where, its exit codes, and that an error is one line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from contextlm.base.device import resolve_device
from contextlm.base.errors import InputError
from contextlm.cli import app
from contextlm.cli.comparisons import read_seeds
from contextlm.cli.output import plain, print_comparison, print_json
from contextlm.cli.shell import execute
from contextlm.lab.estimate import RecipeCost

RECIPE = """
name: toy
question: Does it work?
corpus: text:notes.txt
tokenizer: bpe:300
sequence_length: 8
samples: {train: 4, validation: 2}
training: {epochs: 1}
evaluation: {cache_lengths: [8], speed_tokens: 8}
contenders:
  - {name: base, baseline: true, model: {type: gpt2, n_embd: 16, n_layer: 1, n_head: 2}}
scales: {smoke: {seeds: [0]}}
"""


@dataclass
class Outcome:
    """What a command line left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The error's text, which must be all that was printed."""
        assert self.out == ""
        assert self.err.startswith("contextlm: error: ")
        assert self.err.count("\n") == 1
        assert self.err.endswith("\n")
        return self.err.removeprefix("contextlm: error: ").strip()


Command = Callable[..., Outcome]


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONTEXTLM_CACHE", str(tmp_path / "cache"))
    Path("notes.txt").write_text("some words of a text\n" * 60)
    path = tmp_path / "toy.yaml"
    path.write_text(RECIPE, "utf-8")
    return path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: str | Path) -> Outcome:
        code = execute(app, [str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


# --- help, version, start ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--version"],
        ["run", "--help"],
        ["eval", "--help"],
        ["list", "recipes"],
        ["list", "corpora"],
    ],
)
def test_help_and_version_load_nothing_heavy(arguments: Sequence[str]) -> None:
    program = """
import sys
import contextlm_script
sys.argv = ["contextlm", *sys.argv[1:]]
try:
    contextlm_script.main()
finally:
    heavy = {"torch", "transformers", "numpy", "datasets", "altair", "pandas", "pyarrow"}
    print("heavy:", sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0
    assert done.stdout.strip()
    assert done.stderr == "heavy: []\n"


def test_every_command_explains_itself_with_an_example(command: Command) -> None:
    for name in ("run", "params", "report", "eval", "generate", "list"):
        shown = command(name, "-h")
        assert shown.code == 0
        assert f"contextlm {name}" in shown.out.partition("Examples:")[2]
        assert "```" not in shown.out
        assert not re.search(r"<(bool|list|float|str|path)", shown.out)


def test_examples_name_recipes_and_contenders_that_exist(command: Command) -> None:
    from contextlm.recipe.loading import builtin_recipes, load_recipe

    known = set(builtin_recipes())
    names = {c.name for name in known for c in load_recipe(name).contenders}
    for name in ("run", "params", "report", "eval", "generate"):
        shown = command(name, "-h").out
        assert set(re.findall(r"contextlm (?:run|params) ([a-z][a-z-]*)(?![\w.-])", shown)) <= known
        assert set(re.findall(r"runs/([a-z-]+)-\d+", shown)) <= known
        assert set(re.findall(r"runs/demo-001/([a-z-]+)/", shown)) <= names


# --- usage errors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "culprits"),
    [
        (["rnu"], ["'rnu'", "'run'"]),
        (["run", "demo", "--scle", "x"], ["--scle", "--scale"]),
        (["--vrsion"], ["--vrsion", "--version"]),
        (["run"], ["RECIPE"]),
        (["run", "no-such"], ["unknown recipe 'no-such'"]),
        (["generate", "x", "--max-new-tokens", "many"], ["--max-new-tokens"]),
        (["generate", "x", "--top-p", "2"], ["--top-p"]),
        (["generate", "x", "y", "--top-p", "nan"], ["--top-p"]),
        (["generate", "x", "y", "--temperature", "nan"], ["--temperature"]),
        (["generate", "x", "y", "--temperature", "1e-300"], ["--temperature"]),
        (["generate", "x", "y", "--seed", "9" * 30], ["--seed"]),
        (["generate"], ["CHECKPOINT"]),
        (["eval", "no-such-folder"], ["no-such-folder"]),
        (["eval", "x", "--cache-lengths", "1,b"], ["--cache-lengths '1,b'"]),
        (["list", "recipies"], ["'recipies'", "'recipes'"]),
        (["report"], ["RUN"]),
        (["report", "no-such-folder"], ["no-such-folder"]),
    ],
)
def test_bad_usage_names_the_culprit(
    command: Command, arguments: list[str], culprits: list[str]
) -> None:
    done = command(*arguments)
    assert done.code == 2
    assert all(culprit in done.error for culprit in culprits)


@pytest.mark.parametrize(("text", "seeds"), [("3", [0, 1, 2]), ("0,4,7", [0, 4, 7]), ("7,", [7])])
def test_seeds(text: str, seeds: list[int]) -> None:
    assert read_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", ",", "0", "-1", "1.5", "a", "1,,2", "9" * 30, "1001", "²"])
def test_bad_seeds(text: str) -> None:
    with pytest.raises(InputError, match="--seeds"):
        read_seeds(text)


# --- run, report, params, list ----------------------------------------------------------------


def test_runs_and_their_reports_are_one_json_object(
    command: Command, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--scale", "smoke", "--set", "training.learning_rate=2e-3", "--seeds", "4,")
    done = command("run", recipe_file, *options, "--out", "runs", "--device", "cpu", "--json")
    assert (done.code, done.out.count("\n")) == (0, 1)
    assert "base, seed 4" in done.err
    printed = json.loads(done.out)
    run = Path(printed["run"])
    assert run == Path("runs", "toy-001")
    assert printed["runs"] == [str(run)]
    assert Path(printed["report"]["report.html"]).is_file()
    (result,) = printed["results"]
    assert (result["contender"], result["seed"]) == ("base", 4)
    table = command("report", run).out
    assert f"report.html: {run / 'report.html'}" in table
    other = run.with_name("toy-002")
    shutil.copytree(run, other)
    both = json.loads(command("report", run, other, "--json").out)
    assert both["runs"] == [str(run), str(other)]
    assert len(both["results"]) == 2
    assert (tmp_path / "runs" / "report" / "report.md").is_file()
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: bool(opened.append(url)) or True)
    command("report", run, "--out", "elsewhere", "--open")
    assert opened == [(tmp_path / "elsewhere" / "report.html").as_uri()]
    papers = ("--format", "csv,latex,json", "--language", "ja", "--against", "base")
    said = command("report", run, "--out", "papers", *papers).out
    assert "だけ" in said
    names = {path.name for path in (tmp_path / "papers").iterdir()}
    assert names == {"report.csv", "report.tex", "report.json", "figures"}
    assert "md, html, csv, latex, json" in command("report", run, "--format", "docx").error
    assert "--open" in command("report", run, "--format", "csv", "--open").error
    assert "--language 'xx': expected en or ja" in command("report", run, "--language", "xx").error
    assert "no such contender" in command("report", run, "--against", "nobody").error
    assert "named twice" in command("report", run, run / "." / "").error
    (run / "base" / "seed-4" / "result.json").unlink()
    assert str(run) in command("report", run).error


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(
    command: Command, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("run", recipe_file, "--dry-run", "--device", "cpu", "--out", "runs")
    cost = RecipeCost.model_validate_json(command(*arguments, "--json").out)
    shown = command(*arguments)
    assert shown.code == 0
    for text in (f"{cost.train_tokens:,} training", f"{cost.contenders[0].total:,}", "FLOPs"):
        assert text in shown.out
    assert "training time in all, from a few steps of each: " in shown.out
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=0))
    assert "too large" in command(*arguments).out
    assert not Path("runs").exists()


def test_an_out_that_cannot_be_written_is_refused(
    command: Command, recipe_file: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE, "utf-8")
    bad = [recipe_file, recipe_file / "x", tmp_path / ("n" * 300), ""]
    if Path("/proc/self").exists():
        bad.append(Path("/proc/x"))
    for out in bad:
        for arguments in (["run", recipe_file], ["report", tmp_path]):
            done = command(*arguments, "--out", out)
            assert done.code == 2
            assert done.error.startswith("--out ")
            assert str(out) in done.error or "not a folder" in done.error
    assert not (tmp_path / "x").exists()


def test_a_cache_that_cannot_be_used_is_told_before_the_corpus_is_read(
    command: Command, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONTEXTLM_CACHE", str(recipe_file))
    done = command("run", recipe_file, "--out", tmp_path, "--set", "corpus=text:missing")
    assert done.code == 2
    assert done.error == f"CONTEXTLM_CACHE: {recipe_file}: not a folder"


def test_params_counts_on_the_real_modules(command: Command, recipe_file: Path) -> None:
    done = command("params", recipe_file, "--json")
    (counts,) = json.loads(done.out)["contenders"]
    embedding = 16 * (300 + 1024)
    block = 2 * 32 + (16 * 48 + 48) + (16 * 16 + 16) + (16 * 64 + 64) + (64 * 16 + 16)
    assert counts["total"] == counts["trainable"] == embedding + block + 32
    assert f"{counts['total']:,}" in command("params", recipe_file).out


def test_a_fault_in_the_model_names_the_contender(command: Command, recipe_file: Path) -> None:
    done = command("params", recipe_file, "--set", "contenders.base.model.n_hed=3")
    assert done.code == 2
    assert "n_hed" in done.error


def test_list(command: Command) -> None:
    everything = json.loads(command("list", "--json").out)
    assert list(everything) == ["recipes", "models", "corpora", "policies"]
    for kind, entries in everything.items():
        assert json.loads(command("list", kind, "--json").out) == {kind: entries}
        shown = command("list", kind).out
        assert all(entry["name"] in shown for entry in entries)
    assert "pydocs" in [entry["name"] for entry in everything["corpora"]]
    origins = {entry["name"]: entry["origin"] for entry in everything["models"]}
    assert origins["context_pythia"] == "contextlm"
    assert origins["gpt_neox"] == "transformers"


# --- devices, output -----------------------------------------------------------------------------


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu") == resolve_device("cpu:0") == torch.device("cpu")
    with pytest.raises(InputError, match="cpu:3"):
        resolve_device("cpu:3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(InputError, match="no cuda device"):
        resolve_device("cuda")
    with pytest.raises(InputError, match=r"'cdua'.*'cuda'"):
        resolve_device("cdua")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")
    found = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(InputError, match="this machine has 2"):
        resolve_device("cuda:2")
    with pytest.raises(InputError, match="no meta device"):
        resolve_device("meta")


def test_json_is_valid_for_every_reader(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"nan": float("nan"), "path": Path("a") / "b", "pair": (1, True), 3: {"x": None}})
    expected = {"nan": None, "path": "a/b", "pair": [1, True], "3": {"x": None}}
    assert json.loads(capsys.readouterr().out) == expected
    assert plain(float("-inf")) is None


@pytest.mark.parametrize("columns", [60, 110])
def test_on_a_narrow_terminal_no_name_and_no_figure_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    """Headings are broken; where that is not enough, the table is turned and shown in parts."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    headings = ["contender", *(f"weights, optimiser, logits {n}" for n in range(5))]
    names = [f"context-{kind}-projected" for kind in ("pythia", "hybrid", "wider", "b", "c", "d")]
    rows = [[name, *(f"1,234,567,{m}{n}9" for n in range(5))] for m, name in enumerate(names)]
    print_comparison(headings, rows)
    shown = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out)
    assert max(map(len, shown.splitlines())) <= columns
    assert {cell for row in rows for cell in row} <= set(shown.split())
    assert shown.count("contender") == (1 if columns == 110 else 4)
