"""Budgets: one order for all, a trunk that they share, and the figures of each alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from contextlm.base.errors import InputError
from contextlm.base.progress import SilentProgress
from contextlm.lab import running, work
from contextlm.lab.budgets import Budget
from contextlm.lab.estimate import dry_run
from contextlm.lab.jobs import Planner
from contextlm.lab.preparation import prepare
from contextlm.lab.run_folder import newest_unfinished
from contextlm.recipe.loading import load_recipe
from contextlm.results.result import PhaseTwoRow, read_run
from contextlm.training import next_token

WSD = "training={schedule: wsd, warmup: 1, batch_size: 2, cooldown: 0.2, patience: null}"
SAMPLES = "samples={train: 40, validation: 6}"


def begin(quick: str, out: Path, *overrides: str) -> Path:
    recipe = load_recipe(quick, overrides=[SAMPLES, *overrides])
    return running.run(recipe, out, device="cpu", progress=SilentProgress())


def figures(run: Path, budget: str) -> dict[str, bytes]:
    """The files of every contender that hold no times."""
    kept = ("model.safetensors", "history.jsonl", "result.json", "job.json")
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in run.glob(f"*/budget-{budget}/**/*")
        if path.name in kept
    }


def test_a_longer_order_begins_as_a_shorter_one():
    orders = [
        Budget(share, samples, 10, 3, "", 0).order(3, shuffle=True)
        for share, samples in ((0.5, 5), (1.0, 10), (2.5, 25))
    ]
    assert orders[2][:10] == orders[1]
    assert orders[1][:5] == orders[0]
    epoch = torch.randperm(10, generator=torch.Generator().manual_seed(3)).tolist()
    assert orders[1] == epoch  # what training without budgets shuffles
    assert sorted(orders[2][10:20]) == list(range(10, 20))
    assert len(set(orders[2])) == 25
    assert Budget(0.5, 5, 10, 1, "", 0).order(3, shuffle=False) == [0, 1, 2, 3, 4]


def test_a_text_that_ends_begins_again_in_another_order():
    order = Budget(3.5, 35, 10, 2, "", 0).order(3, shuffle=True)
    assert order[:20] == Budget(2.0, 20, 10, 2, "", 0).order(3, shuffle=True)
    assert sorted(order[20:30]) == list(range(10))
    assert order[20:30] != order[:10]
    assert set(order[30:]) < set(range(10, 20))


def test_a_budget_beyond_the_text_says_how_often_it_reads_it(quick, tmp_path):
    """What is read again must be asked for."""
    asked = ["tokens={train: 700, validation: 97}", "budgets=[0.5, 1, 2.5]", SAMPLES]
    with pytest.raises(InputError, match=r"budgets: 2\.5: .* 40 windows|too small"):
        prepare(load_recipe(quick, overrides=asked), torch.device("cpu"))
    run = begin(quick, tmp_path, *asked, "repeat_text=true", "contenders.ours=null")
    results = [outcome.result for outcome in read_run(run).outcomes]
    assert [result.corpus.text_passes for result in results] == [None, None, 2.5]
    assert [result.trained_tokens for result in results] == [320, 640, 1600]
    once = read_run(
        begin(quick, tmp_path, *asked[:1], "budgets=[0.5, 1]", SAMPLES, "contenders.ours=null")
    )
    assert [outcome.result for outcome in once.outcomes] == results[:2]


@pytest.fixture(scope="module")
def trunk(quick, cache, tmp_path_factory):
    """Three budgets with schedule wsd, and how many optimiser steps they took."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTEXTLM_CACHE", str(cache))
        patch.delenv("CONTEXTLM_DATA", raising=False)
        steps = count_steps(patch)
        run = begin(quick, tmp_path_factory.mktemp("trunk"), WSD, "budgets=[0.5, 1, 1.5]")
    return run, len(steps)


def count_steps(patch: pytest.MonkeyPatch) -> list[int]:
    taken: list[int] = []
    take = next_token._Stepper.take

    def counted(stepper, step, batches):
        taken.append(step)
        return take(stepper, step, batches)

    patch.setattr(next_token._Stepper, "take", counted)
    return taken


def test_budgets_share_the_trunk_and_cost_little_more_than_the_longest(trunk):
    run, steps = trunk
    # Of two contenders: 24 steps of the trunk and its decay of 6, and 2 and 4 of the branches.
    assert steps == 2 * (30 + 2 + 4)
    assert steps <= 1.3 * (2 * 30)
    assert not (run / "_working").exists()


def test_a_dry_run_counts_the_steps_that_will_be_taken(trunk, quick):
    recipe = load_recipe(quick, overrides=[SAMPLES, WSD, "budgets=[0.5, 1, 1.5]"])
    costs = dry_run(recipe, device="cpu").contenders
    assert sum(cost.steps for cost in costs) == trunk[1]
    alone = dry_run(load_recipe(quick, overrides=[SAMPLES, WSD]), device="cpu").contenders
    for cost, one in zip(costs, alone, strict=True):
        assert cost.flops / cost.steps == pytest.approx(one.flops / one.steps)


def test_each_budget_ends_as_it_would_alone(trunk, quick, tmp_path, monkeypatch):
    run, _ = trunk
    steps = count_steps(monkeypatch)
    alone = begin(quick, tmp_path, WSD, "budgets=[1.5]")
    assert len(steps) == 2 * 30
    expected = figures(alone, "1.5")
    assert len(expected) == 2 * 4
    assert figures(run, "1.5") == expected


def test_an_interrupted_run_and_one_budget_more_end_the_same(trunk, quick, tmp_path, monkeypatch):
    run, _ = trunk
    measured = []

    def fail(*arguments):
        measured.append(arguments)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    measure = work.measure_cache
    with monkeypatch.context() as patch:
        patch.setattr(work, "measure_cache", fail)
        with pytest.raises(KeyboardInterrupt):
            begin(quick, tmp_path, WSD, "budgets=[0.5, 1]", "contenders.ours=null")
    cut = newest_unfinished(tmp_path)
    steps = count_steps(monkeypatch)
    running.resume(cut, device="cpu", progress=SilentProgress())
    assert steps == []  # the second budget was trained already, and only to be measured
    recipe = load_recipe(quick, overrides=[SAMPLES, WSD, "budgets=[1.5]", "contenders.ours=null"])
    point = running.Point({}, recipe, "")
    running.extend([point], cut, device="cpu", progress=SilentProgress())
    for budget in ("0.5", "1", "1.5"):
        assert figures(cut, budget) == {
            name: content for name, content in figures(run, budget).items() if "base" in name
        }
    assert [outcome.result.budget for outcome in read_run(cut).outcomes] == [0.5, 1.0, 1.5]
    plain = load_recipe(quick, overrides=[SAMPLES, WSD])
    with pytest.raises(InputError, match="the run has budgets, the recipe none"):
        running.extend([running.Point({}, plain, "")], cut, device="cpu", progress=SilentProgress())


def test_results_say_what_they_were_trained_on(trunk):
    for outcome in read_run(trunk[0]).outcomes:
        result = outcome.result
        assert result.trained_tokens == result.budget * 40 * 16
        assert result.corpus.train_windows == result.budget * 40
        assert result.corpus.train_tokens == result.trained_tokens + 1
        assert result.epochs == result.best_epoch == 1
        last = outcome.history[-1]
        assert isinstance(last, PhaseTwoRow)
        assert last.tokens == result.trained_tokens


@pytest.mark.parametrize(
    "unit",
    [
        ("unit=lines", "tokenizer=word:300"),
        ("unit=answers", "corpus=recall:2", "tokenizer=word:300"),
    ],
)
def test_a_budget_of_lines_or_answers_counts_its_own(quick, unit):
    overrides = [SAMPLES, "budgets=[0.5, 1]", "contenders.ours=null", *unit]
    prepared = prepare(load_recipe(quick, overrides=overrides), torch.device("cpu"))
    entry = prepared.entries["base"]
    for budget in prepared.budgets:
        of_each = [int((entry.pool[n]["labels"] >= 0).sum()) for n in range(budget.samples)]
        assert budget.tokens == sum(of_each)


def test_a_contender_with_a_sample_less_has_budgets_too(quick):
    """Its targets lie farther ahead, and the text ends before its last one."""
    ahead = ["samples=null", "tokens={train: 161, validation: 97}", "contenders.ours.phase1=null"]
    overrides = [*ahead, "budgets=[0.5, 1]", "contenders.ours.target_offset=2"]
    prepared = prepare(load_recipe(quick, overrides=overrides), torch.device("cpu"))
    assert [len(entry.train) for entry in prepared.entries.values()] == [10, 9]
    for entry in prepared.entries.values():
        assert max(prepared.budgets[-1].order(0, shuffle=True)) < len(entry.pool)


def test_a_budget_waits_for_the_smaller_ones(quick, tmp_path):
    overrides = [SAMPLES, WSD, "budgets=[0.5, 1]"]
    made = Planner(
        prepare(load_recipe(quick, overrides=overrides, seeds=[0, 1]), torch.device("cpu"))
    )
    assert [job.title for job in made.ready(tmp_path)] == [
        f"{name}, seed {seed}, budget 0.5" for seed in (0, 1) for name in ("base", "ours")
    ]
    assert str(made.jobs[1].folder) == "base/budget-1/seed-0"
    assert len({job.identity for job in made.jobs}) == len({job.setting for job in made.jobs}) * 2


def test_a_rate_is_tuned_once_for_all_budgets(quick, tmp_path):
    tuning = "tuning={learning_rates: [0.001, 0.002], extensions: 0}"
    run = begin(quick, tmp_path, "budgets=[0.5, 1]", tuning, "contenders.ours=null")
    half, whole = (outcome.result for outcome in read_run(run).outcomes)
    assert half.diverged is None
    assert half.tuning == whole.tuning
    assert half.learning_rate == half.tuning.chosen
    assert len(list((run / "base" / "tuning").iterdir())) == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budgets=[1, 0.5]"], "budgets must ascend"),
        (["repeat_text=true"], "repeat_text: is for budgets"),
        (["budgets=[0.5]", "training.epochs=2"], "needs training.epochs=1"),
        (
            ["budgets=[0.5]", "contenders.ours.training={epochs: 3}"],
            "needs contenders.ours.training.epochs=1",
        ),
        (["budgets=[0.5]", "context_store={}"], "which a context_store forbids"),
        (["budgets=[400]"], r"budgets: 400: corpus .* samples were asked for"),
        (["budgets=[2]", "samples=null"], "more than all of the text: name samples.train"),
        (["budgets=[0.01]"], "budgets: 0.01 of 40 training samples is none"),
        (["budgets=[0.5, 0.51]"], "0.5 and 0.51 of 40 training samples are the same 20"),
        (["budgets=[0.1, 1]", "training.warmup=2"], "less than the 1 steps that training takes"),
        (
            ["budgets=[0.5]", "training={schedule: wsd, warmup: 3}"],
            "less than the 3 steps that training takes before its rate falls",
        ),
        (["training.cooldown=0.1"], "cooldown is for schedule wsd, not constant"),
        (
            ["training={schedule: wsd, schedule_unit: epoch}"],
            "schedule_unit must be step",
        ),
    ],
)
def test_what_cannot_be_had_is_refused(quick, overrides, message):
    with pytest.raises(InputError, match=message):
        prepare(load_recipe(quick, overrides=[SAMPLES, *overrides]), torch.device("cpu"))
