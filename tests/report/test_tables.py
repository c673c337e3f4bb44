"""The tables' cells against figures computed by hand, and their Markdown."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from contextlm.report import tables
from contextlm.report.contenders import contenders
from contextlm.report.document import document_table, epoch_tables
from contextlm.report.numbers import ABSENT
from contextlm.report.sheet import Column, escape_markdown, make_table, markdown_table
from contextlm.results.facts import EmbeddingFacts, StoreFacts

# context-kv: the document ran two epochs beyond its best.
KV = {
    "train_ppl": [559.6, 222.4, 149.1, 106.0, 78.4, 59.6, 46.1],
    "val_ppl": [291.2, 225.1, 196.7, 181.9, 175.7, 183.0, 193.1],
}


def column(table, heading):
    return [row[table.headings.index(heading)] for row in table.rows]


def store(**changes):
    facts = {"fill": "sequential", "dtype": "float32", "train_bytes": 3 * 1024**2}
    facts |= {"validation_bytes": 1024**2, "drift_train": 0.0125, "drift_validation": 0.5}
    return StoreFacts(**facts | changes)


# --- columns and rendering -------------------------------------------------------------------


def test_columns_without_a_figure_are_left_out_and_origins_told_only_side_by_side():
    first = Column("name", str, "text")
    measured, reported = Column("a", lambda item: str(2 * item)), Column("b", str, "reported")
    empty = Column("nothing", lambda item: ABSENT)
    alone = make_table("T", [first, measured, empty], [1, 2])
    assert (alone.headings, alone.rows) == (("name", "a"), (("1", "2"), ("2", "4")))
    beside = make_table("T", [first, measured, reported], [1])
    assert beside.headings == ("name", "a (measured)", "b (reported)")
    assert markdown_table(beside) == (
        "| name | a (measured) | b (reported) |\n| :--- | ---: | ---: |\n| 1 | 2 | 1 |\n"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a|b", r"a\|b"),
        ("two\nlines\r\n", "two lines"),
        ("`code`", r"\`code\`"),
        ("<b> & co", "&lt;b&gt; &amp; co"),
        ("![x](y)", r"!\[x\](y)"),
        ("*a* _b_ snake_case", r"\*a\* \_b\_ snake_case"),
        ("back\\slash", r"back\\slash"),
    ],
)
def test_markdown_escaping(text, expected):
    assert escape_markdown(text) == expected


def test_a_pipe_in_a_name_does_not_add_a_column(made, rows_of):
    rows = [replace(row, name="a|b") for row in rows_of(made())]
    lines = markdown_table(tables.main_tables(rows)[0]).splitlines()
    assert lines[2].replace(r"\|", "").count("|") == lines[0].count("|")


# --- the comparison --------------------------------------------------------------------------


def test_the_comparison_with_three_seeds(run):
    (table,) = tables.main_tables(contenders([run]))
    assert table.headings == (
        "contender",
        "validation PPL (measured)",
        "PPL vs baseline (measured)",
        "95% interval (measured)",
        "verdict",
        "validation PPL (reported)",
        "PPL vs baseline (reported)",
        "cache at 128 tokens (measured)",
        "cache vs baseline (measured)",
        "parameters (measured)",
        "parameters vs baseline (measured)",
    )
    mha, hybrid, compressed = table.rows
    assert mha[:5] == ("mha (baseline)", "100.0 ± 1.0", ABSENT, ABSENT, ABSENT)
    assert hybrid[:3] == ("hybrid", "90.0 ± 1.0", "-10.0%")
    assert hybrid[4:] == ("lower", ABSENT, ABSENT, "64.0 KB", "-50.0%", "2,566,272", "0.0%")
    low, high = hybrid[3].split(" to ")
    assert float(low[:-1]) < -10 < float(high[:-1]) < 0
    assert compressed[4:7] == ("higher", "554.2", "+17.6%")
    assert "paired t over the same seeds" in table.note
    assert "Holm's correction over 2 comparisons" in table.note


def test_one_seed_has_neither_deviation_nor_interval(made, rows_of):
    (table,) = tables.main_tables(rows_of(made(baseline=True), made("hybrid", ppl=90)))
    assert "95% interval" not in table.headings
    assert table.rows[1][:4] == ("hybrid", "90.0", "-10.0%", "undecided (one seed)")
    assert "±" not in markdown_table(table)
    assert table.note == ""


def test_seeds_are_a_column_only_where_they_differ(made, rows_of, run):
    assert "seeds" not in tables.main_tables(contenders([run]))[0].headings
    seeds = [made(baseline=True, seed=n, ppl=100 + n) for n in range(3)]
    others = [made("ctx", seed=n, ppl=80 + n) for n in range(3, 7)]
    (table,) = tables.main_tables(rows_of(*seeds, *others))
    assert column(table, "seeds") == ["3", "4"]
    assert "Welch" in table.note
    assert table.rows[1][4] == "lower"


def test_what_only_holm_leaves_open_says_so(made, rows_of):
    # a against the baseline, seed by seed: p is 0.022 alone and 0.066 of three.
    shifts = {"mha": (0, 0, 0), "a": (-2, -2.6, -3.4), "b": (1, -1, 0), "c": (1, -1, 0.5)}
    rows = rows_of(
        *(
            made(name, seed=seed, ppl=100 + shift, baseline=name == "mha")
            for name, own in shifts.items()
            for seed, shift in enumerate(own)
        )
    )
    assert rows[1].difference.high < 0
    verdicts = column(tables.main_tables(rows)[0], "verdict")
    assert verdicts == [ABSENT, "undecided (Holm)", "undecided", "undecided"]


def test_diverged_contenders_have_it_in_their_row(made, rows_of):
    capped = {"validation_loss": 200.0, "validation_ppl": math.exp(200)}
    rows = rows_of(made(baseline=True), made("a", **capped), made("b"), made("b", seed=1, **capped))
    (table,) = tables.main_tables(rows)
    assert column(table, "validation PPL") == ["100.0", "diverged", "diverged (1 of 2 seeds)"]


def test_each_list_that_may_be_ranked_has_a_table(made, rows_of):
    first, second = tables.main_tables(rows_of(made(baseline=True), made("far", target_offset=2)))
    assert second.caption == (
        "pydocs (Python 3.11.7), bpe:4096, 512,000 training tokens, windows of 128, 2 tokens ahead"
    )
    assert [len(first.rows), len(second.rows)] == [1, 1]


# --- measurements ----------------------------------------------------------------------------


def test_quality(made, rows_of):
    data = made().result.corpus.model_copy(update={"unigram_ppl": 400.0})
    rows = rows_of(
        made(baseline=True, bits_per_byte=None, train_ppl_windows=1000),
        made("a", ppl=80, corpus=data, train_ppl=40.0, train_ppl_running=50.0),
        made("a", ppl=120, corpus=data, train_ppl=60.0, train_ppl_running=50.0, seed=1),
    )
    table = next(t for t in tables.measured_tables(rows) if t.caption == "Quality")
    assert column(table, "share of unigram PPL") == [ABSENT, "25.0 ± 7.1%"]  # 20 % and 30 %
    assert column(table, "bits per byte") == [ABSENT, "1.500 ± 0.000"]
    assert column(table, "train / validation PPL")[1] == "0.500 ± 0.000"
    assert column(table, "validation / running train PPL")[1] == "2.00 ± 0.57"  # 1.6 and 2.4
    assert column(table, "train windows scored") == ["1,000", ABSENT]


def test_phase_one_stores_and_their_absence(made, rows_of):
    rows = rows_of(
        made(baseline=True),
        made("kv", phase1=True, store=store(), store_seconds=2.0),
        made("kv", phase1=True, store=store(drift_train=0.0375), store_seconds=4.0, seed=1),
    )
    found = {table.caption: table for table in tables.measured_tables(rows)}
    phase1 = found["Phase 1, context training"]
    assert column(phase1, "effective rank, training stream") == ["407.5 ± 0.0"]
    assert column(phase1, "of dimensions") == ["500"]
    stores = found["Context stores"]
    assert column(stores, "both") == ["4.0 MB"]
    assert column(stores, "drift, training text") == ["0.0250 ± 0.0177"]
    assert column(stores, "seconds to fill") == ["3.00 ± 1.41 s"]
    alone = {table.caption for table in tables.measured_tables(rows_of(made(baseline=True)))}
    assert not alone & {"Phase 1, context training", "Context stores", "Right answers"}


def test_the_cache_at_every_length(made, rows_of):
    rows = rows_of(made(baseline=True), made("ctx", cache={128: 131_072, 512: 3}))
    table = tables.cache_table(rows)
    assert column(table, "at 512 tokens") == ["512.0 KB", "3 B"]
    assert column(table, "at 2,048 tokens") == ["2.0 MB", ABSENT]
    assert table.rows[0][3] == "256.0 KB", "resident"


def test_sizes_and_speeds(made, rows_of):
    embedding = EmbeddingFacts(source="pretrained", path="gpt2", frozen=True)
    rows = rows_of(made(baseline=True), made("ctx", embedding=embedding, seed=2))
    found = {table.caption: table for table in tables.measured_tables(rows)}
    sizes = found["Size and training"]
    assert column(sizes, "embeddings") == [ABSENT, "pretrained gpt2, frozen"]
    assert column(sizes, "seeds") == ["0", "2"]
    assert column(sizes, "best epoch") == ["3", "3"]
    assert column(found["Speed and memory"], "peak host memory") == ["3.0 GB"] * 2
    timings = rows[1].outcomes[0].timings.model_copy(update={"speed_tokens": 32})
    other = rows_of(
        made(baseline=True), rows[1].outcomes[0].model_copy(update={"timings": timings})
    )
    speed = next(t for t in tables.measured_tables(other) if t.caption == "Speed and memory")
    assert speed.headings.count("vs baseline") == 1, "decoding is not compared"


def test_the_data_once_each(made, rows_of):
    data = made().result.corpus.model_copy(update={"unigram_ppl": 400.0})
    table = tables.data_table(rows_of(made(corpus=data), made("b", corpus=data)))
    assert len(table.rows) == 1
    assert column(table, "train tokens") == ["512,000"]
    assert column(table, "unigram PPL") == ["400.0"]


# --- beside the document ---------------------------------------------------------------------


def test_document_figures_stand_beside_measured_ones(run):
    table = document_table(contenders([run]))
    lines = {row[:2]: row[2:] for row in table.rows}
    # 554.2 / 471.3 = 1.1759; 110 / 100; 64 KB against 128 KB
    assert lines["compressed", "validation PPL"] == ("554.2", "110.0 ± 1.0", "+17.6%", "+10.0%")
    assert lines["compressed", "accuracy"] == ("24.9%", "25.0 ± 0.0%", ABSENT, ABSENT)
    cache = lines["compressed", "cache at 128 tokens"]
    assert cache == ("1.5 MB", "64.0 ± 0.0 KB", "-50.0%", "-50.0%")
    assert lines["mha", "best epoch"][:2] == ("5", "3 ± 0")
    assert table.kinds == ("text", "text", "reported", "measured", "reported", "measured")


def test_unknown_names_and_sizes_of_the_document(made, rows_of):
    reported = {
        **{"something_else": 12.5, "accuracy": 0.249, "cache_bytes_at_64": 10},
        **{"store_mb": 2386, "effective_rank": 0.821},
    }
    table = document_table(rows_of(made(reported=reported, store=store(), phase1=True)))
    assert [row[1:4] for row in table.rows] == [
        ("something else", "12.5", ABSENT),
        ("accuracy", "24.9%", "25.0%"),
        ("cache at 64 tokens", "10 B", ABSENT),
        ("stored contexts and embeddings", "2.3 GB", "4.0 MB"),
        ("effective rank, training stream", "82.1%", "81.5%"),
    ]
    assert document_table(rows_of(made())) is None


def test_epochs_to_the_longer_of_both(made, rows_of):
    # The made-up outcomes of 100 PPL run 4 epochs of 200, 150, 100 and 102 PPL; of 120, seed 1
    # runs 2 epochs of 120 and 122.4.
    same = {"reported_epochs": KV}
    rows = rows_of(made(**same), made(ppl=120, seed=1, epochs=2, **same), made("none"))
    (table,) = epoch_tables(rows)
    assert table.caption == "Epoch by epoch, document and this run: mha"
    assert table.rows[:3] == (
        ("1", "559.6", "291.2", "144.0 ± 50.9", "160.0 ± 56.6"),
        ("2", "222.4", "225.1", "122.6 ± 17.6", "136.2 ± 19.5"),
        ("3", "149.1", "196.7", ABSENT, ABSENT),
    )
    assert [row[0] for row in table.rows] == list("1234567")


@pytest.mark.parametrize("nothing", [{}, {"train_ppl": [None], "val_ppl": []}])
def test_without_epochs_there_is_no_table(made, rows_of, nothing):
    assert epoch_tables(rows_of(made(reported_epochs=nothing))) == []
