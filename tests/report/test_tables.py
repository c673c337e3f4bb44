"""The tables' numbers against numbers computed by hand, and their Markdown."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from contextlm.report import details, document, numbers, tables, words
from contextlm.report.frontier import comparable_groups, headline_length, pareto
from contextlm.report.numbers import Stat
from contextlm.report.sheet import escape_markdown
from contextlm.report.summary import certainty, summarise, summarise_runs
from contextlm.results.facts import StoreFacts


def by_name(rows):
    return {row.name: row for row in rows}


def column(table, label):
    return [row[[c.label for c in table.columns].index(label)] for row in table.rows]


def test_means_deviations_and_differences(three_seeds):
    rows = by_name(summarise(three_seeds))
    assert list(rows) == ["mha", "hybrid", "compressed"]
    hybrid = rows["hybrid"]
    assert hybrid.seeds == (0, 1, 2)
    assert hybrid.ppl == Stat(mean=90.0, sd=1.0, seeds=3)  # 89, 90, 91
    assert hybrid.seconds_per_epoch == Stat(mean=11.0, sd=1.0, seeds=3)  # 10, 11, 12
    assert hybrid.train_validation_ratio.mean == pytest.approx(0.8)
    against = hybrid.comparison
    assert against.reference == "mha"
    assert against.ppl == pytest.approx(-10.0)
    assert against.cache == pytest.approx({128: -50.0, 512: -75.0, 2048: -87.5})
    assert against.decode_rate == pytest.approx(-20.0)
    assert against.parameters == pytest.approx(0.0)
    # 10 against 2 * sqrt(1 + 1) = 2.83
    assert against.certainty == "beyond"
    assert rows["mha"].comparison.reference is None


def test_phase_one_and_its_absence(three_seeds):
    rows = by_name(summarise(three_seeds))
    assert rows["mha"].phase1 is None
    table = tables.phase1_table(list(rows.values()))
    assert [row[0] for row in table.rows] == ["hybrid", "compressed"]
    assert table.rows[0][3] == "407.5 ± 0.0 of 500 (81.5 %)"
    assert tables.phase1_table([rows["mha"]]) is None


def test_a_validation_rank_says_what_it_was_measured_on(made):
    store = StoreFacts(
        fill="sequential",
        dtype="float32",
        train_bytes=8,
        validation_bytes=4,
        drift_train=0.0,
        drift_validation=0.0,
    )
    reported = {"effective_rank_validation": 0.797}
    windows = made("windows", baseline=True, phase1=True, reported=reported)
    stream = made("stream", phase1=True, store=store, reported=reported)
    rows = summarise([windows, stream])
    heading = "effective rank, validation"
    share = "398.5 of 500 (79.7 %)"
    both = tables.phase1_table(rows)
    assert column(both, f"{heading} windows") == [share, numbers.ABSENT]
    assert column(both, f"{heading} stream") == [numbers.ABSENT, share]
    assert column(both, "seconds") == ["12.5 s", "12.5 s"]
    for row, other in (rows, rows[::-1]):
        labels = [c.label for c in tables.phase1_table([row]).columns]
        assert f"{heading} {row.name}" in labels
        assert f"{heading} {other.name}" not in labels
    table = tables.document_table(rows)
    assert column(table, "figure") == [f"{heading} windows", f"{heading} stream"]
    assert column(table, "this run") == ["79.7 %", "79.7 %"]


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        (1000, "80.0 (first 1,000 of 4,000 windows)"),
        (4000, "80.0"),
        (5000, "80.0"),  # there are no more than 4,000
        (None, "80.0"),  # an older result
    ],
)
def test_train_perplexity_of_a_part_is_marked_beside_the_document(made, windows, expected):
    reported = {"train_ppl_best_weights": 736.27, "train_ppl": 667.15}
    rows = summarise([made(baseline=True, reported=reported, train_ppl_windows=windows)])
    assert column(tables.document_table(rows), "this run") == [expected, "90.0"]


@pytest.mark.parametrize(
    ("mean", "sd", "seeds", "expected"),
    [
        (102.9, 1.0, 3, "beyond"),  # 2 * sqrt(2) = 2.828
        (102.8, 1.0, 3, "within"),
        (97.1, 1.0, 3, "beyond"),
        (200.0, 1.0, 2, "two seeds"),
        (200.0, None, 1, "one seed"),
    ],
)
def test_two_deviations_rule(mean, sd, seeds, expected):
    assert certainty(Stat(mean, sd, seeds), Stat(100.0, 1.0, 3)) == expected
    assert certainty(Stat(100.0, 1.0, 3), Stat(mean, sd, seeds)) == expected


def test_stat_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no values"):
        Stat.of([])


def test_stat_of_what_is_known():
    assert Stat.of_known([1.0, None, 3.0]) == Stat.of([1.0, 3.0])
    assert Stat.of_known([None]) is None
    assert Stat.of_known([]) is None


def test_one_seed_has_no_deviation(made):
    rows = summarise([made(baseline=True), made("hybrid", ppl=90)])
    line = tables.main_table(rows).rows[1]
    assert line[1] == "90.0"
    assert "±" not in tables.markdown_table(tables.main_table(rows))
    verdict = words.verdicts(rows)[0]
    assert "One seed cannot tell" in verdict.measured
    assert not verdict.settled


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (numbers.perplexity(9.994), "9.99"),
        (numbers.perplexity(9.996), "10.0"),
        (numbers.perplexity(1225.63), "1,225.6"),
        (numbers.perplexity(math.inf), "not finite"),
        (numbers.human_bytes(0), "0 B"),
        (numbers.human_bytes(1023), "1,023 B"),
        (numbers.human_bytes(1024), "1.0 KB"),
        (numbers.human_bytes(1024 * 1024 - 1), "1.0 MB"),
        (numbers.human_bytes(1536 * 1024), "1.5 MB"),
        (numbers.signed_percent(17.58), "+17.6 %"),
        (numbers.signed_percent(-6.7), "-6.7 %"),
        (numbers.signed_percent(-0.01), "0.0 %"),
        (numbers.signed_percent(1234.5), "+1,234.5 %"),
        (numbers.signed_percent(None), numbers.ABSENT),
        (numbers.percent(0.249), "24.9 %"),
        (numbers.with_deviation(Stat(97.9, 0.44, 3)), "97.9 ± 0.4"),
        (numbers.with_deviation(Stat(97.9, 0.02, 3)), "97.9 ± 0.02"),
        (numbers.with_deviation(Stat(0.249, 0.01, 3), numbers.percent), "24.9 ± 1.0 %"),
        (numbers.with_deviation(None), numbers.ABSENT),
        (numbers.plain(2403563), "2,403,563"),
        (numbers.significant(1.17541), "1.18"),
        (numbers.significant(0.000123456), "0.000123"),
        (numbers.significant(98765.4), "98,765"),
        (numbers.significant(1e-14), "0.000000000"),
        (numbers.significant(0.0), "0"),
        (numbers.significant(math.nan), "not finite"),
        (
            numbers.with_deviation(Stat(0.00123, 0.0004, 3), numbers.significant),
            "0.00123 ± 0.00040",
        ),
        (numbers.gigabytes(1.234), "1.23 GB"),
    ],
)
def test_how_numbers_are_written(text, expected):
    assert text == expected


def test_percent_change_needs_a_sound_base():
    assert numbers.percent_change(1.0, 0.0) is None
    assert numbers.percent_change(math.nan, 1.0) is None


def test_document_figures_stand_beside_measured_ones(three_seeds):
    table = tables.document_table(summarise(three_seeds))
    lines = {row[:2]: row[2:] for row in table.rows}
    # 554.2 / 471.3 = 1.1759; 110 / 100; 64 KB against 128 KB
    assert lines["compressed", "validation PPL"] == ("554.2", "110.0 ± 1.0", "+17.6 %", "+10.0 %")
    assert lines["compressed", "accuracy"][:2] == ("24.9 %", "25.0 ± 0.0 %")
    cache = lines["compressed", "cache at 128 tokens"]
    assert cache == ("1,536 KB", "64.0 KB", "-50.0 %", "-50.0 %")
    assert lines["mha", "best epoch"][:2] == ("5", "3 ± 0")
    kinds = [column.kind for column in table.columns]
    assert kinds == ["text", "text", "reported", "measured", "reported", "measured"]


def test_bits_per_byte_of_a_target_further_ahead_is_a_dash(made):
    rows = summarise(
        [
            made("gpt2", baseline=True),
            made("dca"),
            made("gpt2-2", target_offset=2, architecture="gpt_neox", bits_per_byte=None),
            made("dca-2", target_offset=2, bits_per_byte=None, reported={"bits_per_byte": 2.5}),
        ]
    )
    assert [row.bits_per_byte is None for row in rows] == [False, False, True, True]
    cells = column(tables.quality_table(rows), "bits per byte")
    assert cells == ["1.500", "1.500", numbers.ABSENT, numbers.ABSENT]
    (figure,) = document.document_figures(rows)
    assert (figure.reported, figure.measured, figure.measured_change) == ("2.5", None, None)


def test_both_ratios_of_train_and_validation(made):
    # The document: validation 175.7, running train 78.4; on the best weights 70.28 = 0.4 * 175.7.
    reported = {"train_val_gap": 2.2}
    rows = summarise(
        [
            made(ppl=175.7, train_ppl_running=78.4, train_ppl=70.28, reported=reported),
            made(ppl=100.0, train_ppl_running=50.0, train_ppl=60.0, seed=1),
        ]
    )
    table = tables.quality_table(rows)
    assert column(table, "train / validation PPL, best weights") == ["0.500 ± 0.141"]
    assert column(table, "gap, validation / running train PPL") == ["2.12 ± 0.17"]  # 2.241, 2
    (figure,) = document.document_figures(rows[:1])
    assert figure.label == "gap, validation / running train PPL"
    assert (figure.reported, figure.measured) == ("2.2", "2.12 ± 0.17")


def test_perplexity_as_a_share_of_unigram_perplexity(made):
    data = made().result.corpus.model_copy(update={"unigram_ppl": 400.0})
    rows = summarise(
        [
            made(baseline=True),
            made("a", ppl=80, corpus=data),
            made("a", ppl=120, corpus=data, seed=1),
        ]
    )
    # 20 % and 30 %
    shares = column(tables.quality_table(rows), "share of unigram PPL")
    assert shares == [numbers.ABSENT, "25.0 ± 7.1 %"]


def test_unknown_and_shared_document_figures(made):
    odd = {"something_else": 12.5, "accuracy": 0.249, "cache_bytes_at_64": 10}
    figures = document.document_figures(summarise([made(baseline=True, reported=odd)]))
    assert [(f.label, f.reported, f.measured) for f in figures] == [
        ("something else", "12.5", None),
        ("accuracy", "24.9 %", "25.0 %"),
        ("cache at 64 tokens", "10 bytes", None),
    ]
    assert tables.document_table(summarise([made()])) is None


def test_another_target_is_compared_with_its_own_reference(made):
    rows = by_name(
        summarise(
            [
                made("gpt2", baseline=True),
                made("dca", ppl=107),
                made("gpt2-2", ppl=1225, target_offset=2, architecture="gpt_neox"),
                made("dca-2", ppl=1307, target_offset=2),
                made("far", ppl=2000, target_offset=3),
            ]
        )
    )
    assert rows["dca"].comparison.reference == "gpt2"
    assert rows["gpt2-2"].comparison.reference is None
    assert rows["dca-2"].comparison.reference == "gpt2-2"
    assert rows["far"].comparison.reference is None
    groups = comparable_groups(list(rows.values()))
    assert [[row.name for row in group] for group in groups] == [
        ["gpt2", "dca"],
        ["gpt2-2", "dca-2"],
        ["far"],
    ]
    assert len(words.answer(list(rows.values()))) == 3


def test_without_a_baseline_nothing_is_compared(made):
    rows = summarise([made("hybrid")])
    assert rows[0].comparison.ppl is None
    assert words.verdicts(rows) == []


def test_frontier_of_a_hand_made_set():
    points = [(1.0, 9.0), (2.0, 5.0), (3.0, 6.0), (2.0, 7.0), (4.0, 5.0), (5.0, 1.0), (5.0, 1.0)]
    assert pareto(points) == [0, 1, 5, 6]
    assert pareto([]) == []


def test_headline_length(made):
    both = summarise([made(baseline=True), made("short", cache={128: 9, 512: 9})])
    assert headline_length(both) == 2048
    short_baseline = summarise([made(baseline=True, cache={128: 9, 512: 9}), made("long")])
    assert headline_length(short_baseline) == 512
    assert headline_length(summarise([made(cache={})])) is None


def test_several_runs_get_distinct_names(made, run_of, tmp_path):
    first = run_of([made(baseline=True), made("only")], tmp_path / "a" / "run-1")
    second = run_of([made(baseline=True), made("other", ppl=90)], tmp_path / "b" / "run-1")
    rows = summarise_runs([first, second])
    assert [row.name for row in rows] == ["a/run-1/mha", "only", "b/run-1/mha", "other"]
    assert rows[3].comparison.reference == "b/run-1/mha"
    assert [row.name for row in summarise_runs([first])] == ["mha", "only"]


def test_caches_and_peaks_are_the_largest_over_seeds(made):
    small = made(cache={128: 10}, peak_host_bytes=5)
    large = made(seed=1, cache={128: 30, 512: 40}, peak_host_bytes=7)
    (row,) = summarise([small, large])
    assert [(c.tokens, c.logical, c.resident) for c in row.cache] == [(128, 30, 60), (512, 40, 80)]
    assert row.peak_host_bytes == 7
    table = tables.cache_table([row])
    assert table.rows[0][1:4] == ("128", "30 B", "30")


def test_settings_environment_and_history(run):
    settings = dict(details.settings_table(run).rows)
    assert settings["training.betas"] == "0.9, 0.999"
    assert "training.patience" not in settings, "it is null"
    assert dict(details.contenders_table(run).rows)["hybrid.model.hidden_size"] == "192"
    environment = dict(details.environment_table(run).rows)
    assert environment["versions.torch"] == "2.9.0"
    assert environment["hardware.accelerator"] == "none"
    rows = summarise(run.outcomes)
    (epochs,) = details.history_tables(rows[0])
    assert len(epochs.rows) == 3 * 4
    assert epochs.rows[2][:2] == ("0", "3 (best)")
    _, iterations = details.history_tables(rows[1])
    assert iterations.rows[0] == ("0", "1", "0.0 %", numbers.ABSENT)


def test_markdown_table(three_seeds):
    text = tables.markdown_table(tables.main_table(summarise(three_seeds)))
    header, rule, *body = text.splitlines()
    assert "validation PPL (measured)" in header
    assert "validation PPL (reported)" in header
    assert rule.startswith("| :--- | ---: |")
    assert len({line.count("|") for line in (header, rule, *body)}) == 1
    assert "| mha (baseline) | 100.0 ± 1.0 |" in text


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


def test_a_pipe_in_a_name_does_not_add_a_column(made):
    rows = [replace(row, name="a|b") for row in summarise([made()])]
    lines = tables.markdown_table(tables.main_table(rows)).splitlines()
    assert lines[2].replace(r"\|", "").count("|") == lines[0].count("|")


def test_seeds_are_a_column_only_where_they_differ(made, three_seeds):
    def headings(rows):
        return [column.label for column in tables.main_table(rows).columns]

    assert "seeds" not in headings(summarise(three_seeds))
    uneven = summarise([made(baseline=True), made(baseline=True, seed=1), made("hybrid")])
    assert headings(uneven)[-1] == "seeds"
    assert [row[-1] for row in tables.main_table(uneven).rows] == ["2 seeds", "1 seed"]


def test_settings_name_the_scale_and_leave_out_what_is_not_set(made, run_of, tmp_path):
    run = run_of(
        [made(baseline=True)],
        tmp_path,
        resolved_from="small",
        stride=None,
        departs_from_full=["corpus", "contenders.mha.model.type"],
        training={"groups": [], "warmup": 0, "mixed": False, "nest": {"a": None, "b": []}},
        contenders=[{"name": "mha", "phase1": None, "training": {}, "model": {"type": "x"}}],
    )
    assert details.settings_table(run).rows == (
        ("scale", "small"),
        ("seeds", "0"),
        ("training.warmup", "0"),
        ("training.mixed", "false"),
        ("departs_from_full", "corpus, contenders.mha.model.type"),
    )
    assert details.contenders_table(run).rows == (("mha.model.type", "x"),)
