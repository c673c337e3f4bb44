"""Sweeps: what is refused, what Ray runs, and that its figures are those of separate runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from contextlm.base.errors import InputError
from contextlm.base.locks import locked
from contextlm.base.progress import SilentProgress
from contextlm.cli import app
from contextlm.cli.shell import execute
from contextlm.lab import sweep
from contextlm.lab.experiment import run
from contextlm.lab.sweep_grid import read_grid, settings_of, tasks_of
from contextlm.recipe.schema import load_recipe
from contextlm.results.result import read_run, seed_folder

RECIPE = """
name: toy
question: Which rate?
corpus: pydocs
tokenizer: bpe:300
sequence_length: 16
documents: {train: 4, validation: 2}
samples: {train: 24, validation: 6}
training: {batch_size: 8, epochs: 1, precision: float32}
evaluation: {cache_lengths: [16], speed_tokens: 8}
contenders:
  - name: base
    baseline: true
    model: {type: gpt2, n_embd: 16, n_layer: 1, n_head: 2}
  - name: ours
    model: {type: context_pythia, stream: compressed, hidden_size: 16, context_dim: 8,
            num_hidden_layers: 1, num_attention_heads: 2}
    phase1: {max_iterations: 2}
"""
RATE = "training.learning_rate"
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra: sweep)"
)


pytestmark = pytest.mark.xdist_group("sweep")  # Ray starts once


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    (out / "toy.yaml").write_text(RECIPE, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTEXTLM_CACHE", str(out / "cache"))
        # As many threads in the workers as in the runs that they are compared with.
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("CONTEXTLM_DATA", raising=False)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield out


@pytest.fixture
def command(folder, capsys):
    def call(*arguments):
        given = ["sweep", str(folder / "toy.yaml"), "--out", str(folder / "out"), *arguments]
        code = execute(app, [*given, "--device", "cpu"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_grid_is_yaml():
    texts = [f"{RATE}=1e-3, 2e-3", "training.betas=[0.9, 0.95],[0.8, 0.9]", "corpus=pydocs,'a,b'"]
    assert read_grid(texts) == {
        RATE: [1e-3, 2e-3],
        "training.betas": [[0.9, 0.95], [0.8, 0.9]],
        "corpus": ["pydocs", "a,b"],
    }


@pytest.mark.parametrize(
    ("texts", "fixed", "message"),
    [
        ([], [], "--grid: expected at least one"),
        ([""], [], "expected key=a,b,c"),
        (["training.clip"], [], "expected key=a,b,c"),
        (["training..clip=1.0"], [], "expected key=a,b,c"),
        (["training.clip="], [], "a value is missing"),
        (["training.clip=1.0,"], [], "a value is missing"),
        (["training.clip=1.0,,2.0"], [], "not valid YAML"),
        (["training.clip=[1.0"], [], "not valid YAML"),
        (["training.clip=!!binary aGk="], [], "expected numbers, text, lists or mappings"),
        (["training.clip=&a [*a]"], [], "expected numbers, text, lists or mappings"),
        (["training.clip=1.0,2.0,1.0"], [], "1.0 stands twice"),
        (["training.clip=1.0", "training.clip=2.0"], [], "training.clip stands twice"),
        (["training.clip=1.0"], ["training.clip=3.0"], "also given with --set"),
        (["seeds=1,2"], [], "--seeds"),
    ],
)
def test_what_is_no_grid_is_refused(texts, fixed, message):
    with pytest.raises(InputError, match=message):
        read_grid(texts, fixed)


def test_settings_are_all_combinations_and_have_folders_of_their_own(folder, tmp_path):
    grid = {RATE: [1e-3, 2e-3], "training.batch_size": [4, 8]}
    settings = settings_of(str(folder / "toy.yaml"), grid, tmp_path, seeds=[0, 1])
    assert [tuple(s.values.values()) for s in settings] == [
        (1e-3, 4), (1e-3, 8), (2e-3, 4), (2e-3, 8)
    ]  # fmt: skip
    assert [s.recipe.training.batch_size for s in settings] == [4, 8, 4, 8]
    assert len({s.folder for s in settings}) == 4
    assert settings[0].folder.name.startswith("learning_rate=0.001,batch_size=4-")
    changed = {"overrides": ["training.epochs=2"], "seeds": [0, 1]}
    assert settings_of(str(folder / "toy.yaml"), grid, tmp_path, **changed)[0].folder not in {
        s.folder for s in settings
    }
    more = settings_of(str(folder / "toy.yaml"), grid, tmp_path, seeds=[0, 1, 2])
    assert [s.folder for s in more] == [s.folder for s in settings]
    assert len(tasks_of(more)) == 4 * 3 * 2


def test_a_value_cannot_leave_the_sweeps_folder(folder, tmp_path):
    grid = {"corpus": ["text:../../x", "pydocs"], "question": ["/etc/..", "..", "\u202e|<b>"]}
    for setting in settings_of(str(folder / "toy.yaml"), grid, tmp_path):
        assert setting.folder.resolve().parent == tmp_path.resolve()


def test_without_ray_the_extra_is_named(command, monkeypatch, folder):
    monkeypatch.setattr(sweep.importlib.util, "find_spec", lambda name: None)
    code, out, err = command("--grid", f"{RATE}=1e-3")
    assert (code, out) == (2, "")
    assert err == f"contextlm: error: {sweep.EXTRA}\n"
    assert "contextlm[sweep]" in err


@needs_ray
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--grid: expected at least one"),
        (["--grid", "training.lerning_rate=1e-3"], "did you mean 'training.learning_rate'?"),
        (["--grid", f"{RATE}=1e-3,fast"], "training.learning_rate: "),
        (["--grid", f"{RATE}=1e-3", "--cpus-per-task", "0"], "--cpus-per-task 0: "),
        (["--grid", f"{RATE}=1e-3", "--gpus-per-task", "1.5"], "--gpus-per-task 1.5: "),
    ],
)
def test_bad_usage_is_told_before_anything_starts(command, folder, arguments, message):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (folder / "out").exists()


@pytest.fixture(scope="module")
def four(folder):
    """Four separate runs, by setting and seed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs = {}
    for rate in ("1e-3", "2e-3"):
        for seed in (0, 1):
            recipe = load_recipe(
                str(folder / "toy.yaml"), overrides=[f"{RATE}={rate}"], seeds=[seed]
            )
            made = run(recipe, folder / "four", device="cpu", progress=SilentProgress())
            runs[float(rate), seed] = read_run(made)
    torch.set_num_threads(threads)
    return runs


@needs_ray
def test_a_sweep_gives_the_figures_of_separate_runs_and_goes_on(command, folder, four):
    """Two settings, two seeds; then one of the settings again, and one whose every task fails."""
    import ray

    # Once for the three commands, which would each start it.
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        code, out, _ = command("--grid", f"{RATE}=1e-3,2e-3", "--seeds", "2", "--json")
        assert code == 0
        report = json.loads(out)
        assert (report["tasks"], report["reused"], report["failed"]) == (8, 0, {})
        assert json.loads((folder / "out/sweep.json").read_text()) == report
        _same_figures(report, four)
        before = {p: p.stat().st_mtime_ns for p in (folder / "out").glob("*/*/*/result.json")}
        assert len(before) == 8

        code, out, err = command("--grid", f"{RATE}=2e-3,1e30", "--seeds", "2", "--json")
        assert code == 1
        again = json.loads(out)
        assert (again["tasks"], again["reused"], len(again["failed"])) == (8, 4, 4)
        assert [row["setting"] for row in again["rows"]] == [{RATE: 2e-3}] * 2
        for task, reason in again["failed"].items():
            assert task.startswith(f"{RATE}=1e+30: ")
            assert "loss is" in reason
        assert "error: 4 of 8 tasks failed, the first: training.learning_rate=1e+30: " in err
        assert {path: path.stat().st_mtime_ns for path in before} == before
        assert list((folder / "out").rglob("*.part")) == []

        _tuned_once(command, folder)

        code, out, err = command("--grid", f"{RATE}=2e-3", "--seeds", "3", "--cpus-per-task", "999")
        assert code == 2
        assert "--cpus-per-task 999: no machine has so many" in err
    finally:
        ray.shutdown()
    setting = next((folder / "out").glob("learning_rate=0.001-*"))
    assert execute(app, ["report", str(setting)]) == 0
    assert (setting / "report.html").is_file()


def _tuned_once(command, folder):
    """Tuning is a task before those of the seeds, and all of them take its rate."""
    tuning = "tuning={learning_rates: [1e-3, 1e30], share: 0.5, extensions: 0}"
    grid = ("--grid", "training.clip=1.0", "--seeds", "2", "--json")
    code, out, _ = command(*grid, "--set", tuning, "--set", "contenders.ours=null")
    assert code == 0
    (row,) = json.loads(out)["rows"]
    results = [outcome.result for outcome in read_run(Path(row["run"])).outcomes]
    assert [(r.seed, r.learning_rate) for r in results] == [(0, 1e-3), (1, 1e-3)]
    assert [t.validation_loss is None for t in results[0].tuning.trials] == [False, True]
    assert len(list(Path(row["run"]).glob("base/tuning/*/trial.json"))) == 2
    assert {path.name for path in Path(row["run"]).iterdir()} == {
        *("base", "recipe.yaml", "environment.json")
    }


@needs_ray
def test_a_second_process_on_a_sweep_is_refused(command, folder):
    (folder / "out").mkdir(exist_ok=True)
    with locked(folder / "out" / ".lock", "the test"):
        code, out, err = command("--grid", f"{RATE}=2e-3")
    assert (code, out) == (2, "")
    assert "is at work on it" in err


def _same_figures(report, four):
    """Results to the bit, and the table's means and deviations."""
    assert len(report["rows"]) == 4
    for row in report["rows"]:
        rate, name = row["setting"][RATE], row["contender"]
        singles = []
        for seed in (0, 1):
            alone = four[rate, seed]
            place = seed_folder(alone.folder, name, seed)
            for file in ("result.json", "history.jsonl"):
                swept = seed_folder(alone.folder.__class__(row["run"]), name, seed) / file
                assert swept.read_bytes() == (place / file).read_bytes(), (rate, name, seed, file)
            singles += [o.result for o in alone.outcomes if o.result.contender == name]
        ppls = [result.validation_ppl for result in singles]
        assert row["validation_ppl"]["mean"] == pytest.approx(sum(ppls) / 2, rel=1e-12)
        assert row["validation_ppl"]["sd"] == pytest.approx(abs(ppls[0] - ppls[1]) / 2**0.5)
        assert row["seeds"] == [0, 1]
        assert row["baseline"] == (name == "base")
        assert (row["difference"] is None) == (name == "base")
