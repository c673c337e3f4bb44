"""The report's sentences: wins and losses, what a contender saves and pays, terms."""

from __future__ import annotations

import pytest

from contextlm.report import words
from contextlm.report.summary import summarise
from contextlm.report.terms import terms
from contextlm.report.tradeoff import tradeoffs


def over_seeds(made, name, values, **more):
    return [made(name, ppl=ppl, seed=seed, **more) for seed, ppl in enumerate(values)]


def test_words_report_a_loss_as_a_loss(three_seeds):
    rows = summarise(three_seeds)
    (answer,) = words.answer(rows)
    assert answer == (
        "hybrid has the lowest validation perplexity, 90.0 ± 1.0 (3 seeds). Of 2 contenders "
        "compared with a baseline, 1 wins and 1 loses; 2 of these differences exceed two "
        "standard deviations. "
        "hybrid keeps 87.5 % less cache at 2,048 tokens and has 10.0 % less perplexity. "
        "compressed keeps 50.0 % less cache at 2,048 tokens for 10.0 % more perplexity."
    )
    won, lost = words.verdicts(rows)
    assert (won.outcome, lost.outcome) == ("wins", "loses")
    assert lost.measured.startswith(
        "compressed loses to the baseline mha: its perplexity is 10.0 % higher "
        "(110.0 ± 1.0 against 100.0 ± 1.0, 3 seeds). The difference exceeds two standard"
    )
    assert "Its cache at 2,048 tokens is 1.0 MB (-50.0 %)." in lost.measured
    assert lost.reported == "The document reported +17.6 % of perplexity (554.2 against 471.3)."


def test_words_for_one_contender_a_tie_and_a_pair(made):
    (alone,) = words.answer(summarise([made(baseline=True)]))
    assert alone == "Only mha was measured: validation perplexity 100.0 (1 seed)."
    tie = summarise([made(baseline=True), made("same")])
    assert words.answer(tie)[0].startswith("mha and same share the lowest")
    assert words.verdicts(tie)[0].outcome == "ties"
    pair = summarise([made(baseline=True), made("worse", ppl=117.6)])
    assert words.answer(pair) == [
        "mha has the lowest validation perplexity, 100.0 (1 seed). worse is higher in perplexity "
        "than the baseline mha by 17.6 %; one seed cannot tell whether this is more than chance. "
        "worse keeps as much cache at 2,048 tokens for 17.6 % more perplexity."
    ]


@pytest.mark.parametrize(
    ("values", "outcome", "settled", "told"),
    [
        ((96, 97, 98), "wins", True, "The difference exceeds two standard deviations."),
        ((97, 98, 99), "wins", False, "is within two standard deviations: these seeds do not"),
        ((101, 102, 103), "loses", False, "is within two standard deviations: these seeds do not"),
        ((102, 103, 104), "loses", True, "The difference exceeds two standard deviations."),
    ],
)
def test_three_seeds_tell_by_two_standard_deviations(made, values, outcome, settled, told):
    # Both deviations are 1, so that 2 * sqrt(2) = 2.83 is the limit: 2 is within, 3 beyond.
    rows = summarise(
        over_seeds(made, "mha", (99, 100, 101), baseline=True) + over_seeds(made, "new", values)
    )
    (verdict,) = words.verdicts(rows)
    assert (verdict.outcome, verdict.settled) == (outcome, settled)
    assert told in verdict.measured
    verb = "new wins against" if outcome == "wins" else "new loses to"
    assert verdict.measured.startswith(f"{verb} the baseline mha: its perplexity is ")
    answered = "exceeds" if settled else "is within"
    (answer,) = words.answer(rows)
    assert f"{verb} the baseline mha by " in answer
    assert f"; the difference {answered} two standard deviations." in answer


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize(("ppl", "outcome"), [(90.0, "lower"), (110.0, "higher")])
def test_fewer_seeds_neither_win_nor_lose(made, seeds, ppl, outcome):
    rows = summarise(
        over_seeds(made, "mha", [100.0] * seeds, baseline=True)
        + over_seeds(made, "new", [ppl] * seeds)
    )
    (verdict,) = words.verdicts(rows)
    assert (verdict.outcome, verdict.settled) == (outcome, False)
    said = f"new is {outcome} in perplexity than the baseline mha by 10.0 %"
    assert verdict.measured.startswith(f"{said} (")
    assert "cannot tell whether this is more than chance" in verdict.measured
    (answer,) = words.answer(rows)
    assert said in answer
    for word in (" wins", " loses"):
        assert word not in verdict.measured + answer


def test_counted_answers_keep_wins_apart_from_too_few_seeds(made):
    baseline = over_seeds(made, "mha", (99, 100, 101), baseline=True)
    few = [made("a", ppl=90), made("b", ppl=110), made("c", ppl=120)]
    assert (
        "baseline, 1 is lower and 2 are higher in perplexity; one seed"
        in (words.answer(summarise(baseline + few))[0])
    )
    mixed = summarise(baseline + over_seeds(made, "lost", (119, 120, 121)) + few)
    assert (
        "Of 4 contenders compared with a baseline, 0 win, 1 loses, 1 is lower and 2 are higher in "
        "perplexity; 1 of these differences exceeds two standard deviations, 3 rest on too few"
    ) in words.answer(mixed)[0]
    ties = summarise([*baseline[1:2], made("a", seed=1), made("b", seed=1)])
    assert "compared with a baseline, 2 tie; one seed" in words.answer(ties)[0]


@pytest.mark.parametrize(
    ("cache", "ppl", "said"),
    [
        (501, 117.8, "keeps 49.9 % less cache at 2,048 tokens for 17.8 % more perplexity."),
        (1001, 96.0, "keeps as much cache (+0.1 %) at 2,048 tokens for 4.0 % less perplexity."),
        (1000, 100.0, "keeps as much cache at 2,048 tokens for the same perplexity."),
        (1200, 96.0, "keeps 20.0 % more cache at 2,048 tokens for 4.0 % less perplexity."),
        (1200, 104.0, "keeps 20.0 % more cache at 2,048 tokens and has 4.0 % more perplexity."),
        (800, 96.0, "keeps 20.0 % less cache at 2,048 tokens and has 4.0 % less perplexity."),
    ],
)
def test_what_is_saved_and_what_it_costs(made, cache, ppl, said):
    rows = summarise(
        [made(baseline=True, cache={2048: 1000}), made("c", ppl=ppl, cache={2048: cache})]
    )
    assert tradeoffs(rows, 2048) == [f"c {said}"]
    assert words.answer(rows)[0].endswith(f" c {said}")


def test_the_answer_spells_out_the_three_best_contenders(made):
    ppls = (95, 94, 93, 92)
    rows = summarise([made(baseline=True), *(made(f"c{ppl}", ppl=ppl) for ppl in ppls)])
    sentences = tradeoffs(rows, 2048)
    assert [text.split()[0] for text in sentences[:3]] == ["c94", "c93", "c92"]
    assert sentences[3:] == ["The findings below name 1 more."]
    assert len(tradeoffs(rows[:4], 2048)) == 3


def test_a_shorter_cache_is_spoken_of_at_its_own_length(made):
    rows = summarise(
        [made(baseline=True), made("short", ppl=110, cache={128: 65_536}), made("none", cache={})]
    )
    assert tradeoffs(rows, 2048) == [
        "short keeps 50.0 % less cache at 128 tokens for 10.0 % more perplexity."
    ]


def test_the_frontier_in_words_names_the_windows(three_seeds):
    said = "Validation perplexity on windows of 128 tokens against cache."
    assert words.frontier_alt(summarise(three_seeds)).startswith(said)


def test_terms_of_phase_one_only_where_there_is_one(three_seeds):
    rows = summarise(three_seeds)
    assert {"converged", "effective rank"} == terms(rows).keys() - terms(rows[:1]).keys()
