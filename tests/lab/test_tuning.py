"""Learning rates by one rule: the grid, its extension, what is kept and what is not repeated."""

from __future__ import annotations

import json

import pytest
import torch

from contextlm.base.errors import InputError, NotFiniteError, RunError
from contextlm.base.progress import SilentProgress
from contextlm.lab import tuning
from contextlm.lab.experiment import run
from contextlm.lab.preparation import prepare
from contextlm.recipe.schema import load_recipe
from contextlm.results.result import read_run

CPU = torch.device("cpu")


def recipe(rates="[0.001, 0.002]", *, extensions=2, change=None, **tuned):
    settings = {"learning_rates": rates, "share": 0.25, "extensions": extensions, **tuned}
    inner = ", ".join(f"{key}: {value}" for key, value in settings.items())
    overrides = [
        f"tuning={{{inner}}}",
        "training.warmup=8",
        "contenders.context-pythia=null",
        "contenders.context-pythia-projected=null",
        "contenders.hybrid=null",
    ]
    overrides += [] if change is None else [change]
    return load_recipe("demo", scale="smoke", overrides=overrides)


def tuned(monkeypatch, tmp_path, losses, made=None):
    """The facts that a table of losses by rate leads to, and the rates in the order tried."""
    made = made or recipe()
    tried = []

    def attempt(given, contender, seed, prepared, folder, device, progress, working):
        training = given.training_of(contender)
        windows = prepared.train[contender.name]
        tried.append((training.learning_rate, training.warmup, len(windows), seed))
        loss = losses(training.learning_rate)
        if loss is None:
            raise NotFiniteError("the training loss is nan at step 3")
        return loss

    monkeypatch.setattr(tuning, "try_contender", attempt)
    prepared = prepare(made)
    baseline = made.baseline
    facts = tuning.tune(made, baseline, prepared, tmp_path, CPU, SilentProgress())
    return facts, tried


def test_a_grid_whose_inside_is_best_is_not_extended(monkeypatch, tmp_path):
    made = recipe("[0.001, 0.002, 0.004]", seed=5)
    facts, tried = tuned(monkeypatch, tmp_path, lambda rate: abs(rate - 0.0021), made)
    assert facts.chosen == 0.002
    # A quarter of the 48 windows and of the 8 steps of warm-up.
    assert tried == [(rate, 2, 12, 5) for rate in (0.001, 0.002, 0.004)]


@pytest.mark.parametrize(
    ("best", "further"), [(0.0085, [0.004, 0.008]), (0.0004, [0.0005, 0.00025])]
)
def test_an_end_that_is_best_is_passed(best, further, monkeypatch, tmp_path):
    facts, tried = tuned(monkeypatch, tmp_path, lambda rate: abs(rate - best))
    assert [rate for rate, *_ in tried[2:]] == further  # two extensions at most
    rates = [trial.learning_rate for trial in facts.trials]
    assert rates == sorted(rates)
    assert facts.chosen == min(rates, key=lambda rate: abs(rate - best))


def test_a_rate_that_breaks_down_is_passed_over(monkeypatch, tmp_path):
    facts, tried = tuned(monkeypatch, tmp_path, lambda rate: None if rate > 0.003 else 1 / rate)
    assert [rate for rate, *_ in tried] == [0.001, 0.002, 0.004]
    assert facts.chosen == 0.002
    assert not facts.at_an_end
    assert [trial.validation_loss for trial in facts.trials] == [1000, 500, None]
    # It is remembered: the next seed does not try it again.
    again, tried = tuned(monkeypatch, tmp_path, lambda rate: 0.0)
    assert (again, tried) == (facts, [])
    with pytest.raises(RunError, match="pythia: training broke down at every rate"):
        tuned(monkeypatch, tmp_path / "other", lambda rate: None)


def test_trials_that_were_made_are_not_repeated(monkeypatch, tmp_path):
    first, _ = tuned(monkeypatch, tmp_path, lambda rate: abs(rate - 0.0021))
    again, tried = tuned(monkeypatch, tmp_path, lambda rate: 0.0)
    assert again == first
    assert tried == []


def test_a_trial_of_another_rate_is_made_again(monkeypatch, tmp_path):
    tuned(monkeypatch, tmp_path, lambda rate: abs(rate - 0.0021), recipe("[0.001, 0.002, 0.004]"))
    made = recipe("[0.001, 0.0020000001, 0.004]")
    _, tried = tuned(monkeypatch, tmp_path, lambda rate: abs(rate - 0.0021), made)
    assert [rate for rate, *_ in tried] == [0.0020000001]


def test_a_share_holds_a_batch_where_lesser_ones_are_dropped(monkeypatch, tmp_path):
    made = recipe("[0.001, 0.002, 0.004]", share=0.01, change="training.drop_last=true")
    _, tried = tuned(monkeypatch, tmp_path, lambda rate: abs(rate - 0.0021), made)
    assert {windows for _, _, windows, _ in tried} == {made.training.batch_size}


def test_a_rate_of_ones_own_is_refused_beside_tuning():
    tuning = "tuning={learning_rates: [0.001, 0.002]}"
    for key in ("training", "contenders.pythia.training"):
        for given in (f"{key}.learning_rate=0.003", f"{key}={{learning_rate: 0.003}}"):
            with pytest.raises(InputError, match=f"{key}.learning_rate: tuning chooses"):
                load_recipe("demo", scale="smoke", overrides=[tuning, given])
    groups = "training.parameter_groups=[{match: '*', learning_rate: 0.5}]"
    with pytest.raises(InputError, match="parameter_groups: learning_rate: tuning chooses"):
        load_recipe("demo", scale="smoke", overrides=[tuning, groups])
    load_recipe("demo", scale="smoke", overrides=[tuning, "training.epochs=2"])
    alone = ["training.learning_rate=0.003", "tuning=null"]
    assert load_recipe("frontier", scale="small", overrides=alone).training.learning_rate == 0.003


def test_a_run_takes_the_rate_that_was_chosen_and_says_so(tmp_path):
    folder = run(recipe(extensions=0), tmp_path, device="cpu", progress=SilentProgress())
    (outcome,) = read_run(folder).outcomes
    result = outcome.result
    assert [t.learning_rate for t in result.tuning.trials] == [0.001, 0.002]
    assert result.learning_rate == result.tuning.chosen
    kept = folder / "pythia" / "tuning" / f"{result.learning_rate:g}"
    assert {path.name for path in kept.iterdir()} == {"trial.json", "history.jsonl"}
    trial = json.loads((kept / "trial.json").read_text())
    assert trial["validation_loss"] == min(t.validation_loss for t in result.tuning.trials)
    report = (folder / "report.md").read_text()
    assert f"rate of pythia, {result.learning_rate:g}, is the end of its grid" in report


@pytest.mark.parametrize(
    ("rates", "key"),
    [("[0.001]", "learning_rates"), ("[0.002, 0.001]", "ascend"), ("[0.001, -1.0]", "learning_r")],
)
def test_grids_that_are_none_are_refused(rates, key):
    with pytest.raises(InputError, match=key):
        recipe(rates)


def test_tuning_needs_windows():
    for change in ("context_store={}", "unit=lines"):
        overrides = ["tuning={learning_rates: [0.001, 0.002]}", "stride=null", change]
        with pytest.raises(InputError, match="tuning"):
            load_recipe("demo", scale="smoke", overrides=overrides)
