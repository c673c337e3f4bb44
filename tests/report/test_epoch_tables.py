"""The document's epochs beside the run's: cells computed by hand, and where the tables stand.

The made-up outcomes of 100 PPL run 4 epochs of 200, 150, 100 (best) and 102 PPL; their running
train PPL is 0.9 of that.
"""

from __future__ import annotations

import html

import pytest

from contextlm.report import details, tables
from contextlm.report.epoch_tables import epoch_tables
from contextlm.report.notes import notes
from contextlm.report.numbers import ABSENT
from contextlm.report.page import render_summary, write_report
from contextlm.report.summary import summarise, summarise_runs

# context-kv: the document ran two epochs beyond its best.
KV = {
    "train_ppl": [559.6, 222.4, 149.1, 106.0, 78.4, 59.6, 46.1],
    "val_ppl": [291.2, 225.1, 196.7, 181.9, 175.7, 183.0, 193.1],
}
CAPTION = "Epoch by epoch, document and this run"


def labels(table):
    return [(column.label, column.kind) for column in table.columns]


def knowing_unigrams(made, unigram_ppl):
    return made().result.corpus.model_copy(update={"unigram_ppl": unigram_ppl})


def test_rows_to_the_longer_of_both_and_best_epochs(made):
    (table,) = epoch_tables(summarise([made(reported_epochs=KV), made("none")]))
    assert table.caption == f"{CAPTION}: mha"
    assert labels(table) == [
        ("epoch", "text"),
        ("document train PPL", "reported"),
        ("document validation PPL", "reported"),
        ("train PPL, running", "measured"),
        ("validation PPL", "measured"),
    ]
    assert table.rows == (
        ("1", "559.6", "291.2", "180.0", "200.0"),
        ("2", "222.4", "225.1", "135.0", "150.0"),
        ("3", "149.1", "196.7", "90.0", "100.0 *"),
        ("4", "106.0", "181.9", "91.8", "102.0"),
        ("5", "78.4", "175.7 *", ABSENT, ABSENT),
        ("6", "59.6", "183.0", ABSENT, ABSENT),
        ("7", "46.1", "193.1", ABSENT, ABSENT),
    )


def test_a_longer_run_and_epochs_that_the_document_leaves_out(made):
    reported = {"train_ppl": [210.9, None], "val_ppl": [176.4, None, 128.125]}
    (table,) = epoch_tables(summarise([made(reported_epochs=reported)]))
    assert [row[:3] for row in table.rows] == [
        ("1", "210.9", "176.400"),
        ("2", ABSENT, ABSENT),
        ("3", ABSENT, "128.125 *"),
        ("4", ABSENT, ABSENT),
    ]


def test_means_over_the_seeds_that_reached_the_epoch(made):
    # Seed 1 at 120 PPL: 240, 180, 120 (best), 122.4. Seed 2 stops after 180 (best), 183.6.
    data = knowing_unigrams(made, 400.0)
    rows = summarise(
        [
            made(reported_epochs={"val_ppl": [300.0]}, corpus=data),
            made(ppl=120, seed=1, reported_epochs={"val_ppl": [300.0]}, corpus=data),
            made(ppl=180, seed=2, epochs=2, reported_epochs={"val_ppl": [300.0]}, corpus=data),
        ]
    )
    (table,) = epoch_tables(rows)
    assert labels(table)[-1] == ("share of unigram PPL", "measured")
    # sd of 200, 240, 180 is 30.55; of 150, 180, 183.6 it is 18.45; of 100, 120 it is 14.14.
    assert [row[4] for row in table.rows] == [
        "206.7 ± 30.6 *",
        "171.2 ± 18.4",
        "110.0 ± 14.1 (2 of 3 seeds) *",
        "112.2 ± 14.4 (2 of 3 seeds)",
    ]
    assert table.rows[0][3] == "186.0 ± 27.5"
    assert table.rows[2][5] == "27.5 ± 3.5 % (2 of 3 seeds)"


def test_one_seed_alone_beyond_the_others_says_so(made):
    reported = {"val_ppl": [300.0]}
    seeds = [made(reported_epochs=reported), made(seed=1, epochs=1, reported_epochs=reported)]
    (table,) = epoch_tables(summarise(seeds))
    assert table.rows[3][4] == "102.0 (1 of 2 seeds)"


def test_the_best_epoch_that_the_document_names_goes_before_its_lowest(made):
    reported = {"val_ppl": [300.0, 200.0, 250.0]}

    def best(**named):
        (table,) = epoch_tables(summarise([made(reported_epochs=reported, **named)]))
        return [row[0] for row in table.rows if row[2].endswith("*")]

    assert best() == ["2"]
    assert best(reported={"best_epoch": 3}) == ["3"]
    assert best(reported={"best_epoch": 9}) == []


@pytest.mark.parametrize("nothing", [{}, {"val_ppl": []}, {"train_ppl": [None], "val_ppl": [None]}])
def test_without_epochs_there_is_nothing(made, run_of, tmp_path, nothing):
    run = run_of([made(baseline=True, reported_epochs=nothing)], tmp_path, document=None)
    assert epoch_tables(summarise_runs([run])) == []
    paths = write_report([run], tmp_path / "report")
    for text in (
        render_summary([run]),
        paths["report.md"].read_text("utf-8"),
        paths["report.html"].read_text("utf-8"),
    ):
        for heading in ("Epoch by epoch", "asterisk", "Beside the document", "frequencies reaches"):
            assert heading not in text


def test_epochs_alone_are_figures_of_the_document(made, run_of, tmp_path):
    run = run_of([made(baseline=True, reported_epochs=KV)], tmp_path / "run")
    (note,) = (text for text in notes([run], summarise_runs([run])) if "scale small" in text)
    assert "compare the differences from the baseline" in note
    paths = write_report([run], run.folder)
    for name in ("report.md", "report.html"):
        text = html.unescape(paths[name].read_text("utf-8"))
        assert text.count("Beside the document") == 1
        assert f"{CAPTION}: mha" in text
        assert "An asterisk marks the best epoch" in text
        assert "193.1" in text


def test_the_documents_epochs_are_no_settings(made, run_of, tmp_path):
    contender = {"name": "mha", "model": {"type": "x"}, "reported_epochs": KV}
    run = run_of([made()], tmp_path, contenders=[contender])
    assert details.contenders_table(run).rows == (("mha.model.type", "x"),)


@pytest.fixture
def dca_run(made, run_of, tmp_path):
    """The recipe dca: two targets, each with its own baseline; the document has the second only."""
    data = knowing_unigrams(made, 500.0)
    gpt2 = {"architecture": "gpt2", "corpus": data}
    dca = {"architecture": "dual_context", "parameters_total": 2_700_000, "corpus": data}
    further = {"target_offset": 2, "bits_per_byte": None}
    document = {
        "gpt2-offset-2": {
            "reported": {"val_ppl": 1225.63, "best_epoch": 4},
            "reported_epochs": {"val_ppl": [1437.04, 1293.34, 1244.47, 1225.63, 1237.55]},
        },
        "dca-offset-2": {
            "reported": {"val_ppl": 1307.68, "best_epoch": 2},
            "reported_epochs": {"val_ppl": [1409.73, 1307.68, 1326.0]},
        },
    }
    outcomes = [
        made("gpt2", ppl=100, baseline=True, **gpt2),
        made("dca", ppl=90, **dca),
        made("gpt2-offset-2", ppl=400, **gpt2, **further, **document["gpt2-offset-2"]),
        made("dca-offset-2", ppl=440, **dca, **further, **document["dca-offset-2"]),
    ]
    return run_of(outcomes, tmp_path / "dca")


def test_the_summary_compares_each_target_with_its_own_baseline(dca_run):
    text = render_summary([dca_run])
    first, second = (line for line in text.splitlines() if "predicting" in line)
    assert "dca is lower in perplexity than the baseline gpt2 by 10.0 %" in first
    assert (
        "dca-offset-2 is higher in perplexity than the baseline gpt2-offset-2 by 10.0 %" in second
    )
    assert (
        "- dca-offset-2 is higher in perplexity than the baseline gpt2-offset-2 by 10.0 %" in text
    )
    assert "The document reported +6.7 % of perplexity (1,307.68 against 1,225.63)." in text
    cells = {row[0]: row[1:5] for row in tables.main_table(summarise_runs([dca_run])).rows}
    assert cells["dca"] == ("90.0", "-10.0 %", ABSENT, ABSENT)
    assert cells["gpt2-offset-2"] == ("400.0", ABSENT, "1,225.63", ABSENT)
    assert cells["dca-offset-2"] == ("440.0", "+10.0 %", "1,307.68", "+6.7 %")


def test_the_summary_shows_epochs_below_the_documents_figures_and_unigrams(dca_run):
    text = render_summary([dca_run])
    said = [
        "| contender | figure |",
        f"**{CAPTION}: gpt2-offset-2**",
        rf"| 4 | {ABSENT} | 1,225.63 \* | 367.2 | 408.0 | 81.6 % |",
        f"**{CAPTION}: dca-offset-2**",
        rf"| 3 | {ABSENT} | 1,326.00 | 396.0 | 440.0 \* | 88.0 % |",
        "An asterisk marks the best epoch",
        "- dca is lower in perplexity",
        "frequencies reaches a validation PPL of 500.0.",
    ]
    places = [text.find(one) for one in said]
    assert -1 not in places
    assert places == sorted(places)
    assert text.count("frequencies reaches") == 1
    assert f"**{CAPTION}: dca**" not in text
