"""What a report warns of."""

from __future__ import annotations

import pytest

from contextlm.report.notes import detail_notes, notes
from contextlm.report.summary import summarise_runs


def test_notes(made, run_of, tmp_path):
    outcomes = [
        made(baseline=True, reported={"val_ppl": 9}),
        made("big", parameters_total=3_000_000),
        made("short", cache={32: 4096}),
    ]
    contenders = [{"name": name} for name in ("mha", "big", "short", "late")]
    run = run_of(outcomes, tmp_path, contenders=contenders, seeds=[0, 1])
    text = " ".join(notes([run], summarise_runs([run])))
    assert "Measured at scale small; the document's figures are for its own setting" in text
    assert "big has 16.9 % more parameters than mha" in text
    assert "short stops short of 2,048 tokens: its cache was measured up to 32." in text
    assert "mha (seed 1); big (seed 1); short (seed 1); late (seeds 0, 1)" in text
    full = [made(baseline=True, scale="full")]
    whole = run_of(full, tmp_path)
    assert notes([whole], summarise_runs([whole])) == []


@pytest.mark.parametrize(
    ("converged", "phase1", "said"),
    [
        ([0.93], None, None),
        ([0.9], {}, None),
        ([0.4], {"stop_at": 0.4}, None),
        ([0.002], {"stop_at": 0.85, "max_iterations": 3}, ("3", "0.2", "85")),
        ([0.95, 0.5, 0.7], {"max_iterations": 1000}, ("1,000", "50.0", "90")),
        ([0.93], {"stop_at": 0.95}, ("14", "93.0", "95")),
        ([0.89999], None, ("14", "89.999", "90")),
    ],
)
def test_an_unconverged_phase_one(made, run_of, tmp_path, converged, phase1, said):
    outcomes = [made(baseline=True, scale="full")]
    for seed, share in enumerate(converged):
        one = made("ctx", phase1=True, scale="full", seed=seed)
        facts = one.result.phase1.model_copy(update={"converged": share})
        result = one.result.model_copy(update={"phase1": facts})
        outcomes.append(one.model_copy(update={"result": result}))
    contenders = [{"name": "mha"}, {"name": "ctx", "phase1": phase1}]
    run = run_of(outcomes, tmp_path, contenders=contenders)
    found = [note for note in notes([run], summarise_runs([run])) if "Phase 1" in note]
    if said is None:
        assert found == []
    else:
        limit, share, wanted = said
        assert found == [
            f"Phase 1 of ctx stopped at its limit of {limit} iterations with {share} % converged "
            f"(the recipe asks for {wanted} %)."
        ]


def test_each_run_is_held_to_its_own_recipe(made, run_of, tmp_path):
    def run(name, stop_at):
        contenders = [{"name": "ctx", "phase1": {"stop_at": stop_at}}]
        outcomes = [made("ctx", phase1=True, baseline=True)]
        return run_of(outcomes, tmp_path / name, contenders=contenders, seeds=[0, 1])

    runs = [run("demo-001", 0.95), run("demo-002", 0.9)]
    found = notes(runs, summarise_runs(runs))
    assert [note.split()[3] for note in found if "Phase 1" in note] == ["demo-001/ctx"]
    missing = "demo-001/ctx (seed 1); demo-002/ctx (seed 1)"
    assert f"Not finished, and so not shown: {missing}." in found


def test_smoke_figures_mean_nothing(made, run_of, tmp_path):
    run = run_of([made(baseline=True, scale="smoke", reported={"val_ppl": 9})], tmp_path)
    assert notes([run], summarise_runs([run])) == [
        "Scale smoke only tests that everything runs (51,200 validation tokens): "
        "draw no conclusions from these figures."
    ]


def test_data_of_older_results_counts_as_the_same(made, run_of, tmp_path):
    newer = made().result.corpus.model_copy(update={"unigram_ppl": 400.0})
    outcomes = [made(baseline=True), made("far", target_offset=2, corpus=newer)]
    run = run_of(outcomes, tmp_path)
    assert not any("differ in data" in note for note in notes([run], summarise_runs([run])))


def test_train_perplexity_on_fewer_windows(made, run_of, tmp_path):
    outcomes = [
        made(baseline=True, train_ppl_windows=1000),
        made("all", train_ppl_windows=4000),
        made("b", train_ppl_windows=1000),
        made("c", train_ppl_windows=20),
        made("older"),
    ]
    run = run_of(outcomes, tmp_path)
    rows = summarise_runs([run])
    said = "Train PPL with the best weights was measured on the first"
    assert detail_notes(rows) == [
        f"{said} 1,000 of 4,000 train windows (mha, b).",
        f"{said} 20 of 4,000 train windows (c).",
    ]
    assert not any(said in note for note in notes([run], rows)), "the summary shows no train PPL"
