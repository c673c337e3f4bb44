"""Jobs: what decides their identity, what waits for what, and the rule that tunes rates."""

from __future__ import annotations

import pickle

import pytest
import torch

from contextlm.base.errors import InputError, NotFiniteError
from contextlm.base.files import write_json
from contextlm.lab.jobs import Planner, check_job, differing_keys, write_job
from contextlm.lab.preparation import prepare
from contextlm.lab.work import _highest_rate, first_part
from contextlm.recipe.loading import load_recipe
from contextlm.results.result import TrialResult

CPU = torch.device("cpu")


def planner(toy, *overrides, seeds=None):
    return Planner(prepare(load_recipe(toy, overrides=overrides, seeds=seeds), CPU))


def test_every_contender_and_seed_is_a_job_seed_by_seed(toy, tmp_path):
    made = planner(toy, seeds=[0, 4])
    assert [job.title for job in made.jobs] == [
        "base, seed 0",
        "ours, seed 0",
        "base, seed 4",
        "ours, seed 4",
    ]
    assert made.ready(tmp_path) == made.jobs
    assert len({job.identity for job in made.jobs}) == 4
    assert made.jobs[0].setting == made.jobs[2].setting != made.jobs[1].setting
    assert str(made.jobs[1].folder) == "ours/seed-0"
    assert pickle.loads(pickle.dumps(made.jobs[1])) == made.jobs[1]


def test_the_identity_is_that_of_all_that_decides_the_figures(toy):
    first = planner(toy).jobs
    assert [job.identity for job in planner(toy, seeds=[0, 1]).jobs[:2]] == [
        job.identity for job in first
    ]
    for override, key, changed in (
        ("training.epochs=2", "training.epochs", [True, True]),
        ("contenders.ours.model.context_dim=16", "model.context_dim", [False, True]),
        ("contenders.ours.phase1.noise=0.05", "phase1.noise", [False, True]),
        ("contenders.ours.target_offset=2", "target_offset", [False, True]),
        ("evaluation.cache_lengths=[8]", "evaluation.cache_lengths", [True, True]),
        ("evaluation.speed_tokens=9", None, [False, False]),
        ("stride=16", None, [False, False]),
        ("training.weight_decay=0.01", None, [False, False]),
        ("samples.train=25", "train_samples", [True, True]),
        ("question=Another?", None, [False, False]),
        ("contenders.ours.reported={val_ppl: 3.0}", None, [False, False]),
    ):
        others = planner(toy, override).jobs
        pairs = list(zip(first, others, strict=True))
        assert [one.identity != other.identity for one, other in pairs] == changed, override
        assert key is None or key in differing_keys(pairs[1][0].decides, pairs[1][1].decides)


def test_a_changed_job_is_refused_by_the_keys_that_differ(toy, tmp_path):
    for job in planner(toy).jobs:
        write_job(tmp_path, job)
        check_job(tmp_path, job)
    changed = planner(toy, "training.clip=1.0", "training.epochs=2").jobs[1]
    with pytest.raises(InputError) as caught:
        check_job(tmp_path, changed)
    assert "ours, seed 0" in str(caught.value)
    assert "training.clip, training.epochs differ" in str(caught.value)
    file = tmp_path / changed.folder / "job.json"
    file.write_text("{", "utf-8")
    with pytest.raises(InputError, match=r"job\.json: is damaged"):
        check_job(tmp_path, changed)
    file.unlink()
    check_job(tmp_path, changed)  # nothing is there
    write_json(tmp_path / changed.folder / "result.json", {})
    with pytest.raises(InputError, match="an earlier contextlm made it"):
        check_job(tmp_path, changed)


def test_entries_of_a_list_are_told_apart_by_name():
    one = {"contenders": [{"name": "a", "x": 1}, {"name": "b", "x": 1}], "seeds": [0]}
    other = {"contenders": [{"name": "b", "x": 2}, {"name": "a", "x": 1}], "seeds": [1]}
    assert differing_keys(one, other) == ["contenders.b.x", "seeds"]
    assert differing_keys(one, one) == []


def tuned(toy, run, loss_of, *overrides, rates="[0.001, 0.002]", extensions=2):
    """Answer every trial by a function of its rate; the rates in the order tried, and the facts."""
    tuning = f"tuning={{learning_rates: {rates}, share: 0.25, extensions: {extensions}, seed: 5}}"
    made = planner(toy, tuning, "contenders.ours=null", "training.warmup=2", *overrides)
    tried = []
    while (job := made.ready(run)[0]).kind == "trial":
        tried.append(job.rate)
        assert job.seed == 5
        trial = TrialResult(
            job=job.identity, learning_rate=job.rate, validation_loss=loss_of(job.rate)
        )
        write_json(run / job.folder / "result.json", trial.model_dump())
    return tried, made.tuning(run, made.prepared.entries["base"]), made


def test_a_grid_whose_inside_is_best_is_not_extended(toy, tmp_path):
    tried, facts, made = tuned(
        toy, tmp_path, lambda rate: abs(rate - 0.0021), rates="[0.001, 0.002, 0.004]"
    )
    assert tried == [0.001, 0.002, 0.004]
    assert facts.chosen == 0.002
    part = first_part(made.prepared, "base")  # of 24 windows and 2 steps of warm-up
    assert (len(part.entries["base"].train), part.entries["base"].training.warmup) == (6, 0)
    assert len(part.stream) == 6 * 16 + 1
    again, same, _ = tuned(toy, tmp_path, lambda rate: 0.0, rates="[0.001, 0.002, 0.004]")
    assert (again, same) == ([], facts)  # what was tried is not tried again
    other, _, _ = tuned(
        toy, tmp_path, lambda rate: abs(rate - 0.0021), rates="[0.001, 0.0020000001, 0.004]"
    )
    assert other == [0.0020000001]
    changed, _, _ = tuned(toy, tmp_path, lambda rate: 1.0, "training.clip=1.0", extensions=0)
    assert changed == [0.001, 0.002]


@pytest.mark.parametrize(
    ("best", "further"), [(0.0085, [0.004, 0.008]), (0.0004, [0.0005, 0.00025])]
)
def test_an_end_that_is_best_is_passed(toy, tmp_path, best, further):
    tried, facts, _ = tuned(toy, tmp_path, lambda rate: abs(rate - best))
    assert tried[2:] == further  # two extensions at most
    rates = [trial.learning_rate for trial in facts.trials]
    assert rates == sorted(rates)
    assert facts.chosen == min(rates, key=lambda rate: abs(rate - best))


def test_a_rate_that_diverges_is_passed_over(toy, tmp_path):
    tried, facts, _ = tuned(toy, tmp_path, lambda rate: None if rate > 0.003 else 1 / rate)
    assert tried == [0.001, 0.002, 0.004]
    assert facts.chosen == 0.002
    assert not facts.at_an_end
    assert [trial.validation_loss for trial in facts.trials] == [1000, 500, None]
    with pytest.raises(NotFiniteError, match="training diverged at every learning rate"):
        tuned(toy, tmp_path / "other", lambda rate: None)


def test_a_share_holds_a_batch_where_lesser_ones_are_dropped(toy):
    tuning = "tuning={learning_rates: [0.001, 0.002], share: 0.01}"
    made = planner(toy, tuning, "training.drop_last=true")
    assert len(first_part(made.prepared, "base").entries["base"].train) == 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.warmup=3"], "training.warmup 3 must be less than the 3 steps that training"),
        (
            ["training.warmup=2", "tuning={learning_rates: [0.001, 0.002], share: 0.3}"],
            "training.warmup 1 must be less than the 1 steps that training takes to tune a rate",
        ),
    ],
)
def test_a_warm_up_as_long_as_training_is_refused(toy, overrides, message):
    with pytest.raises(InputError, match=f"contenders.base: {message}"):
        planner(toy, *overrides)


def test_the_rate_of_a_result_is_the_highest_that_was_reached(toy):
    made = planner(toy, "training.warmup=2", "training.learning_rate=0.5")
    rates = [_highest_rate(made.prepared.entries["base"], steps) for steps in (1, 2, 3)]
    assert rates == [0.25, 0.5, 0.5]


def test_contenders_wait_for_their_own_trials_only(toy, tmp_path):
    made = planner(toy, "tuning={learning_rates: [0.001, 0.002], extensions: 0}", seeds=[0, 1])
    ready = made.ready(tmp_path)
    assert [job.title for job in ready] == [
        f"{name}, trying learning rate {rate}"
        for name in ("base", "ours")
        for rate in ("0.001", "0.002")
    ]
    for job in ready[:2]:
        trial = TrialResult(job=job.identity, learning_rate=job.rate, validation_loss=1.0)
        write_json(tmp_path / job.folder / "result.json", trial.model_dump())
    assert [job.title for job in made.ready(tmp_path)] == [
        "base, seed 0",
        *(job.title for job in ready[2:]),
        "base, seed 1",
    ]


def test_a_learned_embedding_comes_first(toy, tmp_path):
    made = planner(toy, "embedding={source: learned, sequence_length: 16}")
    assert [job.kind for job in made.ready(tmp_path)] == ["embedding"]
    assert {job.decides["embedding"]["source"] for job in made.jobs} == {"learned"}
    assert "embedding_text" in made.jobs[0].decides["data"]


def test_a_rate_of_ones_own_is_refused_beside_tuning():
    tuning = "tuning={learning_rates: [0.001, 0.002]}"
    for key in ("training", "contenders.pythia.training"):
        for given in (f"{key}.learning_rate=0.003", f"{key}={{learning_rate: 0.003}}"):
            with pytest.raises(InputError, match=f"{key}.learning_rate: tuning chooses"):
                load_recipe("demo", scale="smoke", overrides=[tuning, given])
    groups = "training.parameter_groups=[{match: '*', learning_rate: 0.5}]"
    with pytest.raises(InputError, match="parameter_groups: learning_rate: tuning chooses"):
        load_recipe("demo", scale="smoke", overrides=[tuning, groups])
    alone = ["training.learning_rate=0.003", "tuning=null"]
    assert load_recipe("frontier", scale="small", overrides=alone).training.learning_rate == 0.003


@pytest.mark.parametrize(
    ("rates", "key"),
    [("[0.001]", "learning_rates"), ("[0.002, 0.001]", "ascend"), ("[0.001, -1.0]", "learning_r")],
)
def test_rates_that_are_no_grid_are_refused(toy, rates, key):
    with pytest.raises(InputError, match=key):
        load_recipe(toy, overrides=[f"tuning={{learning_rates: {rates}}}"])


def test_tuning_needs_windows():
    for change in ("context_store={}", "unit=lines"):
        overrides = ["tuning={learning_rates: [0.001, 0.002]}", "stride=null", change]
        with pytest.raises(InputError, match="tuning"):
            load_recipe("demo", scale="smoke", overrides=overrides)
