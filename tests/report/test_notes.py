"""The answer, and what a report warns of."""

from __future__ import annotations

import math

import pytest

from contextlm.report.contenders import contenders
from contextlm.report.notes import answers, notes
from contextlm.results.facts import RetrievalAccuracy, TuningFacts, TuningTrial


@pytest.fixture
def answered(run_of, tmp_path):
    """The answers of one run of these outcomes."""
    return lambda *outcomes: answers(contenders([run_of(list(outcomes), tmp_path / "run")]))


@pytest.fixture
def noted(run_of, tmp_path):
    """The notes of one run of these outcomes."""

    def note(*outcomes, **recipe):
        run = run_of(list(outcomes), tmp_path / "run", **recipe)
        return notes([run], contenders([run]))

    return note


# --- the answer ------------------------------------------------------------------------------


def test_two_sentences_with_interval_and_cache_at_the_windows_length(run):
    (sentence,) = answers(contenders([run]))
    assert sentence.startswith(
        "hybrid has the lowest validation perplexity, 90.0 ± 1.0 (3 seeds): 10.0% lower than the "
        "baseline mha (95% interval -1"
    )
    assert sentence.endswith("). It keeps 50.0% less cache at 128 tokens.")
    assert not {"wins", "loses"} & set(sentence.split())


@pytest.mark.parametrize(("seeds", "word"), [(1, "one seed"), (2, "two seeds")])
def test_few_seeds_have_no_interval(made, answered, seeds, word):
    outcomes = [
        made(name, seed=seed, ppl=ppl + seed, baseline=name == "mha")
        for name, ppl in (("mha", 100), ("ctx", 90))
        for seed in range(seeds)
    ]
    (sentence,) = answered(*outcomes)
    assert f"lower than the baseline mha ({word}: no interval)" in sentence


def test_overlapping_seeds_are_undecided(made, answered):
    shifts = {"mha": (0, 1, 2), "ctx": (1, -2, 0)}
    (sentence,) = answered(
        *(
            made(name, seed=seed, ppl=100 + shift, baseline=name == "mha")
            for name, own in shifts.items()
            for seed, shift in enumerate(own)
        )
    )
    assert "1.3% lower than the baseline mha (undecided, 95% interval -" in sentence
    assert "ctx has the lowest validation perplexity, 99.7 ± 1.5 (3 seeds)" in sentence


def test_where_the_baseline_is_lowest_the_nearest_is_named(made, answered):
    (sentence,) = answered(made(baseline=True), made("far", ppl=200), made("near", ppl=110))
    assert sentence == (
        "mha has the lowest validation perplexity, 100.0 (1 seed). The nearest, near, is 10.0% "
        "higher than the baseline mha (one seed: no interval), with as much cache at 128 tokens."
    )


def test_alone_equal_and_diverged(made, answered):
    assert answered(made(baseline=True)) == [
        "Only mha was measured: validation perplexity 100.0 (1 seed)."
    ]
    assert answered(made(baseline=True), made("same")) == [
        "mha and same share the lowest validation perplexity, 100.0 (1 seed)."
    ]
    broken = {"validation_loss": math.inf, "validation_ppl": math.inf}
    assert answered(made(baseline=True, **broken)) == ["Training diverged in every contender."]
    (sentence,) = answered(made(baseline=True), made("ctx", **broken))
    assert sentence == "mha has the lowest validation perplexity, 100.0 (1 seed)."


def test_a_synthetic_task_is_answered_by_right_answers(made, answered):
    def asked(name, share, **changes):
        level = RetrievalAccuracy(level="4 pairs", accuracy=share, answers=10)
        return made(name, retrieval=[level], accuracy=share, **changes)

    (sentence,) = answered(asked("mha", 0.5, baseline=True, ppl=5), asked("ctx", 0.75, ppl=9))
    assert sentence.startswith("ctx has the most right answers, 75.0% (1 seed): 25.0 points higher")


def test_other_targets_are_answered_apart(made, answered):
    first, second = answered(made(baseline=True), made("far", target_offset=2))
    assert "windows of 128: Only mha was measured" in first
    assert "2 tokens ahead: Only far was measured" in second


# --- notes -----------------------------------------------------------------------------------


def test_nothing_to_beware_of(made, noted):
    assert noted(made(baseline=True, scale="full")) == []


def test_sizes_precisions_and_missing_seeds(made, noted):
    found = noted(
        made(baseline=True, scale="full"),
        made("big", parameters_total=3_000_000, precision="bfloat16"),
        contenders=[{"name": name} for name in ("mha", "big", "late")],
        seeds=[0, 1],
    )
    assert sorted(found) == [
        "Not finished, and so not shown: mha (seed 1); big (seed 1); late (seeds 0, 1).",
        "big has 16.9% more parameters than mha: they are not matched in size.",
        "mha, big were trained in different precisions.",
    ]


def test_what_learned_nothing(made, noted):
    data = made().result.corpus.model_copy(update={"unigram_ppl": 90.0})
    (found,) = noted(made(baseline=True, scale="full", corpus=data))
    assert found.startswith("mha has learned nothing beyond how frequent each token is")
    assert found.endswith("a perplexity of 90.0, and it has 111.1% of that.")


def test_where_nothing_was_learned_the_answer_says_so(made, answered):
    data = made().result.corpus.model_copy(update={"unigram_ppl": 90.0})
    (sentence,) = answered(made(baseline=True, corpus=data), made("ctx", ppl=95, corpus=data))
    assert sentence.endswith("No contender has learned more than how frequent each token is.")


def test_a_length_at_which_quality_was_not_measured_is_not_named(made, answered):
    (sentence,) = answered(
        made(baseline=True, cache={2048: 9000}), made("ctx", ppl=90, cache={2048: 9})
    )
    assert sentence.endswith("10.0% lower than the baseline mha (one seed: no interval).")


@pytest.mark.parametrize(("best", "told"), [(1e-3, False), (2e-3, True)])
def test_a_rate_at_the_end_of_its_grid(made, noted, best, told):
    rates = [5e-4, 1e-3, 2e-3]
    trials = [TuningTrial(learning_rate=r, validation_loss=abs(r - best)) for r in rates]
    facts = TuningFacts(share=0.25, seed=0, trials=trials)
    found = noted(made(baseline=True, scale="full", tuning=facts))
    said = ["The learning rate of mha, 0.002, is the end of its grid: another may be better."]
    assert found == (said if told else [])


@pytest.mark.parametrize(
    ("converged", "phase1", "said"),
    [
        ([0.93], None, None),
        ([0.4], {"stop_at": 0.4}, None),
        ([0.95, 0.5, 0.7], {"stop_at": 0.85}, ("50", "85")),
        ([0.89999], None, ("89.999", "90")),
    ],
)
def test_an_unconverged_phase_one(made, noted, converged, phase1, said):
    outcomes = [made(baseline=True, scale="full")]
    for seed, share in enumerate(converged):
        one = made("ctx", phase1=True, scale="full", seed=seed)
        facts = one.result.phase1.model_copy(update={"converged": share})
        result = one.result.model_copy(update={"phase1": facts})
        outcomes.append(one.model_copy(update={"result": result}))
    contenders = [{"name": "mha"}, {"name": "ctx", "phase1": phase1}]
    found = [note for note in noted(*outcomes, contenders=contenders) if "Phase 1" in note]
    assert found == (
        []
        if said is None
        else [
            f"Phase 1 of ctx stopped at its limit of iterations with {said[0]}% converged (the "
            f"recipe asks for {said[1]}%)."
        ]
    )


@pytest.mark.parametrize(
    ("scale", "reported", "keys", "said"),
    [
        ("full", True, ["corpus"], "document's setting, it differs in: corpus. Compare"),
        ("small", True, list("abcdefghi"), "it differs in: a, b, c, d, e, f, 3 more."),
        ("full", True, ["contenders.ctx.model.x"], "it differs in: contenders.ctx.model.x."),
        ("full", True, ["contenders.mha.model.x"], None),  # no figure of the document's
        ("small", True, None, "it differs in: scale. Compare"),
        ("full", True, None, None),
        ("small", False, ["corpus"], "Measured at scale small, not at the recipe's full setting."),
        ("fair", False, [], None),
        ("full", False, ["corpus"], None),  # there is no figure to take it for
        ("smoke", True, ["corpus"], "Scale smoke only tests that everything runs"),
    ],
)
def test_how_far_from_the_setting_it_stands_for(made, noted, scale, reported, keys, said):
    outcomes = [
        made(name, baseline=name == "mha", scale=scale, reported=figures)
        for name, figures in (("mha", {}), ("ctx", {"val_ppl": 9} if reported else {}))
    ]
    found = noted(*outcomes, departs_from_full=keys)
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_several_runs_say_which(made, run_of, tmp_path):
    runs = [
        run_of(
            [made(baseline=True, reported={"val_ppl": 9})],
            tmp_path / name,
            departs_from_full=keys,
            seeds=[0, 1],
        )
        for name, keys in (("run-1", []), ("run-2", ["corpus"]))
    ]
    found = notes(runs, contenders(runs))
    assert any(
        "Not the document's setting (run-2), it differs in: corpus" in note for note in found
    )
    assert "Not finished, and so not shown: run-1/mha (seed 1); run-2/mha (seed 1)." in found
