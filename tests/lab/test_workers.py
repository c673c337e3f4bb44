"""Grids and workers: what is refused, and that workers give the figures of one process."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from contextlm.base.errors import InputError
from contextlm.cli import app
from contextlm.cli.shell import execute
from contextlm.lab import executors
from contextlm.lab.grid import points_of_grid, read_grid
from contextlm.results.result import read_run

RATE = "training.learning_rate"
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra: workers)"
)


@pytest.fixture
def command(toy, tmp_path_factory, capsys, monkeypatch):
    # As many threads in this process as in the workers.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)

    def call(*arguments):
        code = execute(app, ["run", *arguments, "--device", "cpu"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield call
    torch.set_num_threads(before)


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
        ([""], [], "expected key=a,b,c"),
        (["training.clip"], [], "expected key=a,b,c"),
        (["training..clip=1.0"], [], "expected key=a,b,c"),
        (["training.clip="], [], "a value is missing"),
        (["training.clip=1.0,"], [], "a value is missing"),
        (["training.clip=[1.0"], [], "not valid YAML"),
        (["training.clip=1.0,2.0,1.0"], [], "1.0 stands twice"),
        (["training.clip=1.0", "training.clip=2.0"], [], "training.clip stands twice"),
        (["training.clip=1.0"], ["training.clip=3.0"], "also given with --set"),
        (["seeds=1,2"], [], "--seeds"),
    ],
)
def test_what_is_no_grid_is_refused(texts, fixed, message):
    with pytest.raises(InputError, match=message):
        read_grid(texts, fixed)


def test_points_are_all_combinations_and_have_names_of_their_own(toy):
    grid = {RATE: [1e-3, 2e-3], "training.batch_size": [4, 8]}
    points = points_of_grid(toy, grid, seeds=[0, 1])
    assert [tuple(p.values.values()) for p in points] == [
        (1e-3, 4), (1e-3, 8), (2e-3, 4), (2e-3, 8)
    ]  # fmt: skip
    assert [p.recipe.training.batch_size for p in points] == [4, 8, 4, 8]
    assert len({p.name for p in points}) == 4
    assert points[0].name.startswith("learning_rate=0.001,batch_size=4-")
    hostile = {"corpus": ["text:../../x", "pydocs"], "question": ["/etc/..", "..", "\u202e|<b>"]}
    for point in points_of_grid(toy, hostile):
        assert Path(point.name).name == point.name != ".."


def test_without_ray_the_extra_is_named(command, toy, monkeypatch, tmp_path):
    monkeypatch.setattr(executors.importlib.util, "find_spec", lambda name: None)
    code, out, err = command(toy, "--workers", "2", "--out", str(tmp_path / "out"))
    assert (code, out) == (2, "")
    assert "--workers needs Ray: pip install 'ray>=2.50'" in err


def figures(folder: Path) -> dict[str, bytes]:
    """Results and histories by their place below a folder."""
    found = [*folder.rglob("result.json"), *folder.rglob("history.jsonl")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@needs_ray
def test_two_workers_give_the_figures_of_one_process_to_the_bit(command, toy, tmp_path):
    """A grid of rates with tuning trials in one point; then what fails in a worker is told."""
    import ray

    grid = ["--grid", "training.clip=1.0,2.0", "--seeds", "2"]
    tuning = "tuning={learning_rates: [1e-3, 1e30], share: 0.5, extensions: 0}"
    given = [toy, *grid, "--set", tuning, "--set", "contenders.ours=null"]
    code, out, err = command(*given, "--out", str(tmp_path / "one"), "--json")
    assert code == 0, err
    assert json.loads(out)["grid"] == str(tmp_path / "one/toy-grid-001")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)  # once for both commands
    try:
        code, out, err = command(*given, "--out", str(tmp_path / "two"), "--workers", "2")
        assert code == 0, err
        one, two = (tmp_path / name / "toy-grid-001" for name in ("one", "two"))
        assert figures(one) == figures(two)
        # At each point a result and a history of two seeds and of two trials.
        assert len(figures(one)) == 2 * 2 * (2 + 2)
        for point in one.glob("*/recipe.yaml"):
            results = [outcome.result for outcome in read_run(point.parent).outcomes]
            assert [(r.seed, r.learning_rate) for r in results] == [(0, 1e-3), (1, 1e-3)]
            assert [t.validation_loss is None for t in results[0].tuning.trials] == [False, True]
    finally:
        ray.shutdown()


def test_a_grid_that_stopped_is_resumed_and_extended(command, toy, tmp_path, monkeypatch):
    out = tmp_path / "out"
    given = [toy, "--out", str(out), "--set", "contenders.ours=null"]
    grid = ["--grid", f"{RATE}=1e-3,2e-3"]
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    from contextlm.lab import work

    measure = work.measure_cache
    with monkeypatch.context() as patch:
        patch.setattr(work, "measure_cache", fail)
        code, _, err = command(*given, *grid)
    folder = out / "toy-grid-001"
    assert code == 130
    assert f"to resume: contextlm run --resume {folder}" in err
    first = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    assert len(first) == 1
    code, _, err = command(*given, *grid, "--resume")
    assert code == 0, err
    assert f"resuming {folder}" in err
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert len(figures(folder)) == 2 * 2
    assert {path.name for path in folder.iterdir() if path.is_file()} >= {
        "points.json",
        "grid.md",
        "grid.json",
    }
    # One more point and one more seed of all.
    more = [*given[:1], *given[3:], "--grid", f"{RATE}=1e-3,2e-3,4e-3", "--seeds", "2"]
    code, text, err = command(*more, "--into", str(folder))
    assert code == 0, err
    assert len(figures(folder)) == 3 * 2 * 2
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert "0.004" in text
    code, _, err = command("--resume", str(folder))
    assert (code, err) == (0, f"{folder} has finished: nothing to resume\n")


def test_the_old_name_says_the_new_one(toy, tmp_path, capsys):
    place = tmp_path / "swept"
    given = ["sweep", toy, "--grid", f"{RATE}=1e-3", "--set", "contenders.ours=null"]
    assert execute(app, [*given, "--out", str(place), "--device", "cpu"]) == 0
    assert "contextlm sweep is now contextlm run RECIPE --grid" in capsys.readouterr().err
    assert len(figures(place)) == 2
    assert execute(app, given[:2]) == 2
    assert "--grid: expected at least one" in capsys.readouterr().err
