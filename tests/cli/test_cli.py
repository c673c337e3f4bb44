"""The command line: what it prints where, its exit codes, and that an error is one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contextlm.lab.plan import ContenderPlan, ParameterCount, Plan

from contextlm.base.device import resolve_device
from contextlm.base.errors import InputError, RunError
from contextlm.cli import app
from contextlm.cli.comparisons import read_seeds
from contextlm.cli.output import duration, plain, print_comparison, print_json
from contextlm.cli.shell import execute
from contextlm.recipe.schema import Recipe

RECIPE = """
name: toy
question: Does it work?
tokenizer: bpe:300
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
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: str | Path) -> Outcome:
        code = execute(app, [str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(RECIPE, "utf-8")
    return path


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a function in the place of one that a command imports when it runs."""

    def replace(module: str, **functions: Any) -> None:
        for name, function in functions.items():
            monkeypatch.setattr(f"{module}.{name}", function)

    return replace


# --- help, version, start ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["-h"],
        ["--version"],
        *(
            [name, "--help"]
            for name in ("run", "sweep", "params", "report", "eval", "generate", "list")
        ),
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
    heavy = {"torch", "transformers", "numpy", "datasets", "matplotlib", "pandas", "pyarrow"}
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


def test_no_arguments_print_the_help(command: Command) -> None:
    assert command() == command("--help") == command("-h") == command("--debug")
    assert "Usage: contextlm" in command().out


def test_every_command_explains_itself_with_an_example(command: Command) -> None:
    for name in ("run", "sweep", "params", "report", "eval", "generate", "list"):
        shown = command(name, "-h")
        assert shown.code == 0
        assert f"contextlm {name}" in shown.out.partition("Examples:")[2]
        assert "```" not in shown.out
        assert not re.search(r"<(bool|list|float|str|path)", shown.out)


def test_the_main_help_names_the_variables_of_the_environment(command: Command) -> None:
    (line,) = [line for line in command("--help").out.splitlines() if "CONTEXTLM_DATA" in line]
    assert "CONTEXTLM_CACHE" in line


def test_examples_name_recipes_and_contenders_that_exist(command: Command) -> None:
    from contextlm.recipe.loading import builtin_recipes, load_recipe

    known = set(builtin_recipes())
    names = {c.name for name in known for c in load_recipe(name).contenders}
    for name in ("run", "sweep", "params", "report", "eval", "generate"):
        shown = command(name, "-h").out
        assert (
            set(re.findall(r"contextlm (?:run|sweep|params) ([a-z][a-z-]*)(?![\w.-])", shown))
            <= known
        )
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
        (["run", "demo", "more"], ["more"]),
        (["run", "demo", "--scale"], ["--scale"]),
        (["run", "no-such"], ["unknown recipe 'no-such'"]),
        (["generate", "x", "--max-new-tokens", "many"], ["--max-new-tokens"]),
        (["generate", "x", "--top-p", "2"], ["--top-p"]),
        (["generate", "x", "y", "--top-p", "nan"], ["--top-p"]),
        (["generate", "x", "y", "--temperature", "nan"], ["--temperature"]),
        (["generate", "x", "y", "--temperature", "inf"], ["--temperature"]),
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


# --- run, params -----------------------------------------------------------------------------


def test_run_passes_everything_on_and_prints_one_json_object(
    command: Command, stand_in: Any, recipe_file: Path, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}

    def run(recipe: Recipe, out: Path, *, device: str, progress: Any) -> Path:
        seen.update(recipe=recipe, out=out, device=device)
        progress.stage("base, seed 4")
        progress.line("epoch 1")
        return out / "toy-001"

    stand_in("contextlm.lab.experiment", run=run)
    folder = tmp_path / "somewhere"
    stand_in(
        "contextlm.results.result",
        read_run=lambda path: SimpleNamespace(folder=path, outcomes=[]),
    )
    stand_in("contextlm.report.tables", summarise_runs=lambda runs: [{"ppl": float("nan")}])
    done = command(
        *("run", recipe_file, "--scale", "smoke", "--set", "sequence_length=16"),
        *(
            "--set",
            "training.epochs=2",
            "--seeds",
            "4,",
            "--out",
            folder,
            "--device",
            "cpu",
            "--json",
        ),
    )
    assert done.code == 0
    assert done.out.count("\n") == 1
    printed = json.loads(done.out)
    assert printed["run"] == str(folder / "toy-001")
    assert printed["runs"] == [printed["run"]]
    assert printed["report"]["report.html"] == str(folder / "toy-001" / "report.html")
    assert printed["rows"] == [{"ppl": None}]
    assert done.err == "\nbase, seed 4\nepoch 1\n"
    recipe = seen["recipe"]
    assert (recipe.scale, recipe.seeds) == ("smoke", [4])
    assert (recipe.sequence_length, recipe.training.epochs) == (16, 2)
    assert (seen["out"], seen["device"]) == (folder, "cpu")


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


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RunError("the loss is not finite")])
@pytest.mark.parametrize("finished", [True, False])
def test_a_run_that_ends_early_says_where_its_folder_is(
    capsys: pytest.CaptureFixture[str],
    stand_in: Any,
    recipe_file: Path,
    tmp_path: Path,
    error: BaseException,
    finished: bool,
) -> None:
    def run_contender(recipe: Recipe, contender: Any, seed: int, prepared: Any, place: Path, *rest):
        if finished:
            place.mkdir(parents=True)
            (place / "result.json").write_text("{}")
        raise type(error)(*error.args)

    stand_in(
        "contextlm.lab.experiment",
        prepare=lambda recipe: SimpleNamespace(learning_text=None),
        describe_environment=lambda device, seeds: {"device": str(device)},
        data_fingerprint=lambda prepared: {},
        run_contender=run_contender,
    )
    out = tmp_path / "runs"
    code = execute(app, ["run", str(recipe_file), "--out", str(out), "--device", "cpu"])
    last = capsys.readouterr().err.splitlines()[-1]
    said = "what finished is in" if finished else "nothing had finished in"
    folder = out / "toy-001"
    assert last.endswith(f"; {said} {folder}; to go on: contextlm run --resume {folder}")
    what = {130: "contextlm: interrupted;", 1: "contextlm: error: the loss is not finite;"}
    assert last.startswith(what[code])


def test_dry_run_prints_the_plan_and_writes_nothing(
    command: Command, stand_in: Any, recipe_file: Path, tmp_path: Path
) -> None:
    plan = Plan(
        name="toy",
        scale="full",
        corpus="pydocs",
        tokenizer="bpe:300",
        train_tokens=12345,
        validation_tokens=678,
        contenders=[
            ContenderPlan(
                name="base",
                total=1000000,
                trainable=900000,
                trainable_phase2=800000,
                tokens_per_epoch=12288,
                epochs=3,
                seeds=2,
                tuning_trials=3,
                flops=1.25e15,
                seconds_estimate=7300.0,
                memory_bytes_estimate=3 * 2**20,
            )
        ],
    )
    stand_in("contextlm.lab.plan", dry_run=lambda recipe, device: plan)
    out = tmp_path / "runs"
    shown = command("run", recipe_file, "--dry-run", "--out", out)
    assert shown.code == 0
    for figure in ("base", "1,000,000", "800,000", "12,345", "1.2e15", "2.0 h", "3.0 MB"):
        assert figure in shown.out
    assert "training time, roughly" in shown.out
    assert "of it 3 learning rates a contender on a part of the text" in shown.out
    assert "weights, optimiser, logits" in shown.out
    assert "at most" not in shown.out
    assert shown.out.endswith("phase 1, data preparation and measuring come on top\n")
    shown = command("run", recipe_file, "--dry-run", "--json", "--out", out)
    assert Plan.model_validate_json(shown.out) == plan
    assert not out.exists()


def test_params_counts_on_the_real_modules(command: Command, recipe_file: Path) -> None:
    done = command("params", recipe_file, "--json")
    (counts,) = json.loads(done.out)["contenders"]
    assert set(counts) == {"name", "total", "trainable", "trainable_phase2"}
    embedding = 16 * (300 + 1024)
    block = 2 * 32 + (16 * 48 + 48) + (16 * 16 + 16) + (16 * 64 + 64) + (64 * 16 + 16)
    assert counts["total"] == counts["trainable"] == embedding + block + 32
    assert f"{counts['total']:,}" in command("params", recipe_file).out


def test_params_shows_what_each_phase_trains(
    command: Command, stand_in: Any, recipe_file: Path
) -> None:
    count = ParameterCount(name="base", total=5000, trainable=4000, trainable_phase2=3000)
    stand_in("contextlm.lab.plan", count_parameters=lambda recipe: [count])
    out = command("params", recipe_file).out
    assert all(figure in out for figure in ("5,000", "4,000", "3,000"))


def test_a_fault_in_the_model_names_the_contender(command: Command, recipe_file: Path) -> None:
    done = command("params", recipe_file, "--set", "contenders.base.model.n_hed=3")
    assert done.code == 2
    assert "n_hed" in done.error


# --- report, list ------------------------------------------------------------------------------


def test_report_of_several_runs_goes_beside_them(
    command: Command, stand_in: Any, tmp_path: Path
) -> None:
    written: list[Any] = []

    def write_report(runs: list[Any], folder: Path) -> dict[str, Path]:
        written.append((len(runs), folder))
        return {"report.html": folder / "report.html"}

    outcome = SimpleNamespace(result=SimpleNamespace(model_dump=lambda: {"seed": 3}))
    stand_in(
        "contextlm.results.result",
        read_run=lambda path: SimpleNamespace(folder=path, outcomes=[outcome]),
    )
    stand_in("contextlm.report.page", write_report=write_report)
    stand_in("contextlm.report.tables", summarise_runs=lambda runs: [])
    opened: list[str] = []
    stand_in("webbrowser", open=lambda url: bool(opened.append(url)) or True)
    runs = [tmp_path / "runs" / "a-001", tmp_path / "runs" / "b-001"]
    for run in runs:
        run.mkdir(parents=True)
        (run / "recipe.yaml").write_text(RECIPE, "utf-8")
    done = command("report", *runs, "--json")
    assert json.loads(done.out)["runs"] == [str(run) for run in runs]
    assert json.loads(done.out)["results"] == [{"seed": 3}, {"seed": 3}]
    command("report", runs[0], "--json", "--open")
    command("report", *runs, "--out", tmp_path / "both", "--json")
    assert written == [
        (2, tmp_path / "runs" / "report"),
        (1, runs[0]),
        (2, tmp_path / "both"),
    ]
    assert opened == [(runs[0] / "report.html").as_uri()]


def test_report_without_results_says_so(command: Command, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE, "utf-8")
    (tmp_path / "environment.json").write_text("{}", "utf-8")
    done = command("report", tmp_path)
    assert done.code == 2
    assert str(tmp_path) in done.error


def test_report_wants_run_folders_each_once(command: Command, tmp_path: Path) -> None:
    assert command("report", "nope").error == "nope: not a run folder"
    (tmp_path / "recipe.yaml").write_text(RECIPE, "utf-8")
    done = command("report", tmp_path, tmp_path / "." / "")
    assert done.code == 2
    assert "named twice" in done.error


def test_list(command: Command) -> None:
    everything = json.loads(command("list", "--json").out)
    assert list(everything) == ["recipes", "models", "corpora"]
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


def test_a_wide_table_is_turned_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = ["contender", *(f"a long heading {n}" for n in range(9))]
    print_comparison(columns, [["base", *"123456789"]])
    assert len(capsys.readouterr().out.strip().splitlines()) == 3
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    print_comparison(columns, [["base", *"123456789"]])
    turned = capsys.readouterr().out
    assert "a long heading 8" in turned
    assert max(map(len, turned.splitlines())) <= 60


def test_in_a_narrow_table_names_break_at_hyphens_and_figures_never(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")  # else headings are set bold
    columns = ["contender", *(f"weights, optimiser, logits {n}" for n in range(5))]
    names = [f"context-{kind}-projected" for kind in ("pythia", "hybrid", "wider", "b", "c", "d")]
    rows = [[name, *(f"1,234,567,{m}{n}9" for n in range(5))] for m, name in enumerate(names)]
    print_comparison(columns, rows)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert all(figure in shown for row in rows for figure in row[1:])
    words = set(shown.replace("─", " ").split())
    assert {"context-", "pythia-", "hybrid-", "projected", "contender"} <= words


def test_durations_read_well() -> None:
    assert [duration(s) for s in (0.4, 89, 600, 7200)] == ["< 1 s", "89 s", "10 min", "2.0 h"]
