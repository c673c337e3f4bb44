"""Rows of a report: merged over runs, compared with a baseline, grouped by what may be ranked."""

from __future__ import annotations

import json
import math

import pytest

from contextlm.base.errors import InputError
from contextlm.base.files import plain
from contextlm.report.contenders import (
    cache_length,
    comparable_groups,
    contenders,
    ranked,
    row_facts,
)
from contextlm.report.statistics import Stat


def names(rows):
    return [row.name for row in rows]


def test_means_deviations_and_differences(run):
    mha, hybrid, compressed = contenders([run])
    assert names([mha, hybrid, compressed]) == ["mha", "hybrid", "compressed"]
    assert hybrid.stat("validation_ppl") == Stat(90.0, 1.0, 3)  # 89, 90, 91
    assert hybrid.stat("seconds_per_epoch") == Stat(11.0, 1.0, 3)  # 10, 11, 12
    assert hybrid.reference.name == "mha"
    assert hybrid.change("cache_bytes_2048") == pytest.approx(-87.5)
    assert hybrid.change("decode_rate") == pytest.approx(-20.0)
    assert 100 * math.expm1(hybrid.difference.mean) == pytest.approx(-10.0, abs=0.01)
    assert hybrid.difference.paired
    assert (hybrid.difference.verdict, compressed.difference.verdict) == ("lower", "higher")
    assert hybrid.difference.holm >= hybrid.difference.p
    assert (mha.reference, mha.difference) == (None, None)
    assert mha.reported_change("val_ppl") is None
    assert compressed.reported_change("val_ppl") == pytest.approx(17.59, abs=0.01)


def test_several_runs_get_distinct_names(made, run_of, tmp_path):
    first = run_of([made(baseline=True), made("only")], tmp_path / "a" / "run-1")
    second = run_of([made(baseline=True), made("other", ppl=90)], tmp_path / "b" / "run-1")
    rows = contenders([first, second])
    assert names(rows) == ["a/run-1/mha", "only", "b/run-1/mha", "other"]
    assert rows[3].reference.name == "b/run-1/mha"
    assert names(contenders([first])) == ["mha", "only"]


def test_seeds_of_one_setting_merge_over_runs(made, run_of, tmp_path):
    def run(name, seeds, setting):
        outcomes = [
            made(contender, seed=seed, ppl=ppl + seed, baseline=contender == "mha", setting=own)
            for contender, ppl, own in (("mha", 100, "s"), ("ctx", 90, setting))
            for seed in seeds
        ]
        return run_of(outcomes, tmp_path / name)

    merged = contenders([run("a", [0, 1], "c"), run("b", [1, 2], "c")])
    assert names(merged) == ["mha", "ctx"]
    assert [row.seeds.seed.tolist() for row in merged] == [[0, 1, 2]] * 2, "no seed counts twice"
    assert merged[1].reference.name == "mha"
    assert merged[1].difference.verdict == "lower"
    assert len(merged[1].outcomes) == 3
    other = contenders([run("a", [0, 1], "c"), run("b", [2, 3], "d")])
    assert names(other) == ["mha", "a/ctx", "b/ctx"]
    assert [row.reference.name for row in other[1:]] == ["mha", "mha"]
    older = contenders([run("a", [0], None), run("b", [1], None)])
    assert names(older) == ["mha", "a/ctx", "b/ctx"]


def test_another_target_is_compared_with_its_own_reference(made, rows_of):
    rows = rows_of(
        made("gpt2", baseline=True),
        made("dca", ppl=107),
        made("gpt2-2", ppl=1225, target_offset=2, architecture="gpt_neox"),
        made("dca-2", ppl=1307, target_offset=2),
        made("far", ppl=2000, target_offset=3),
    )
    references = {row.name: row.reference and row.reference.name for row in rows}
    assert references == {
        **{"gpt2": None, "dca": "gpt2", "gpt2-2": None, "dca-2": "gpt2-2", "far": None}
    }
    grouped = [["gpt2", "dca"], ["gpt2-2", "dca-2"], ["far"]]
    assert list(map(names, comparable_groups(rows))) == grouped


def test_other_data_and_other_budgets_are_not_ranked_together(made, run_of, tmp_path):
    more = made().result.corpus.model_copy(update={"train_tokens": 1_024_000})
    longer = {"epochs": 9}
    runs = [
        run_of([made(baseline=True)], tmp_path / "a"),
        run_of([made(baseline=True, corpus=more)], tmp_path / "b"),
        run_of([made(baseline=True)], tmp_path / "c", training=longer),
        run_of([made(baseline=True)], tmp_path / "d", training=longer),
    ]
    groups = comparable_groups(contenders(runs))
    assert list(map(names, groups)) == [["a/mha"], ["b/mha"], ["c/mha", "d/mha"]]


def test_budgets_of_one_run_are_rows_of_their_own(made, run_of, tmp_path):
    outcomes = []
    for share, tokens in ((0.5, 256_000), (1.0, 512_000)):
        corpus = made().result.corpus.model_copy(update={"train_tokens": tokens})
        for seed in range(2):
            outcomes += [
                made(name, ppl=ppl, seed=seed, baseline=name == "mha", corpus=corpus, budget=share)
                for name, ppl in (("mha", 100), ("ctx", 50 / share))
            ]
    rows = contenders([run_of(outcomes, tmp_path / "run", budgets=[0.5, 1.0])])
    assert names(rows) == [
        *("mha, 256,000 tokens", "ctx, 256,000 tokens"),
        *("mha, 512,000 tokens", "ctx, 512,000 tokens"),
    ]
    assert [row.reference and row.reference.name for row in rows] == [
        *(None, "mha, 256,000 tokens"),
        *(None, "mha, 512,000 tokens"),
    ]
    groups = comparable_groups(rows)
    assert [len(group) for group in groups] == [2, 2]
    assert ranked(groups[1])[0].name == "ctx, 512,000 tokens"


def test_against_another_contender_than_the_baseline(run, made, run_of, tmp_path):
    mha, hybrid, compressed = contenders([run], against="hybrid")
    assert (hybrid.reference, hybrid.shown_name) == (None, "hybrid (baseline)")
    assert (mha.reference.name, compressed.reference.name) == ("hybrid", "hybrid")
    assert (mha.shown_name, mha.difference.verdict) == ("mha", "higher")
    assert 100 * math.expm1(mha.difference.mean) == pytest.approx(100 / 90 * 100 - 100, abs=0.02)
    with pytest.raises(InputError, match="--against 'x': no such contender, there are mha, hybrid"):
        contenders([run], against="x")
    other = run_of([made("newer", ppl=80, seed=seed) for seed in range(3)], tmp_path / "b")
    rows = contenders([run, other], against="newer")
    assert [row.reference and row.reference.name for row in rows] == ["newer"] * 3 + [None]


def test_without_a_baseline_nothing_is_compared(made, rows_of):
    (row,) = rows_of(made("hybrid"))
    assert (row.reference, row.difference, row.change("parameters")) == (None, None, None)


def test_a_diverged_seed_leaves_nothing_to_compare(made, rows_of):
    broken = made("ctx", seed=1, validation_loss=90.0, validation_ppl=math.exp(90))
    rows = rows_of(made(baseline=True), made(baseline=True, seed=1), made("ctx"), broken)
    assert rows[1].diverged == [1]
    assert rows[1].difference is None
    assert rows[0].diverged == []


def test_a_synthetic_task_is_compared_by_right_answers(made, rows_of):
    from contextlm.results.facts import RetrievalAccuracy

    def asked(name, share, **changes):
        level = RetrievalAccuracy(level="4 pairs", accuracy=share, answers=10)
        return made(name, retrieval=[level], accuracy=share, **changes)

    rows = rows_of(asked("mha", 0.5, baseline=True), asked("ctx", 0.75))
    assert rows[1].task
    assert rows[1].levels == ["answers_4_pairs"]
    assert rows[1].difference.mean == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ([128, 512], 128),  # the windows have 128 tokens
        ([64, 512, 2048], None),  # no length that both were measured at
        ([], None),
    ],
)
def test_cache_and_quality_are_told_at_one_length(made, rows_of, measured, expected):
    assert cache_length(rows_of(made(cache={n: 10 * n for n in measured}))) == expected


def test_histories_by_seed(made, rows_of):
    from contextlm.results.result import StepRow

    one = made(phase1=True)
    steps = [StepRow(step=n, epoch=1, loss=4.0, learning_rate=1e-3) for n in (1, 2)]
    one = one.model_copy(update={"history": [*one.history, *steps]})
    (row,) = rows_of(one)
    assert row.epochs().epoch.tolist() == [1, 2, 3, 4]
    assert row.steps().step.tolist() == [1, 2]


def test_rows_for_programs(run, made, run_of, tmp_path):
    facts = json.loads(json.dumps(plain(row_facts(contenders([run])[2]))))
    assert facts["name"] == "compressed"
    assert facts["seeds"] == [0, 1, 2]
    assert facts["validation_ppl"] == {"mean": 110.0, "sd": 1.0, "seeds": 3}
    assert facts["cache_bytes_2048"] == 1_048_576
    assert facts["reported"] == {"val_ppl": 554.2, "accuracy": 24.9, "cache_kb_at_128": 1536.0}
    assert (facts["reference"], facts["verdict"]) == ("mha", "higher")
    assert facts["difference"]["low"] > 0
    assert facts["phase1_iterations"]["mean"] == 14
    (broken,) = contenders([run_of([made(validation_loss=math.inf)], tmp_path / "x")])
    assert plain(row_facts(broken))["validation_loss"]["mean"] is None
