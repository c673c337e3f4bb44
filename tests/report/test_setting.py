"""What a report says about runs that are not at a document's, or their recipe's, full setting."""

from __future__ import annotations

import pytest

from contextlm.report.notes import notes
from contextlm.report.page import write_report
from contextlm.report.summary import summarise_runs
from contextlm.results.result import read_run

BEYOND = "compare the differences from the baseline rather than the figures themselves."
BY_SCALE = "Measured at scale "


@pytest.fixture
def said(made, run_of, tmp_path):
    """The notes on the setting of a run of ``mha`` (baseline), ``ctx`` and others, by keys.

    ``ctx`` has a figure of the document, unless told otherwise.
    """

    def build(*, scale="full", reported=("ctx",), folder="run", **recipe):
        outcomes = [
            made(
                name,
                baseline=name == "mha",
                scale=scale,
                reported={"val_ppl": 9} if name in reported else {},
            )
            for name in ("mha", "ctx", "grid")
        ]
        return run_of(outcomes, tmp_path / folder, **recipe)

    def say(*runs, **settings):
        runs = list(runs) or [build(**settings)]
        found = notes(runs, summarise_runs(runs))
        marks = "setting", "Scale smoke"
        return [note for note in found if any(mark in note for mark in marks)]

    say.build = build
    return say


@pytest.mark.parametrize(
    ("keys", "differ"),
    [
        (["documents.train"], "documents.train differs"),
        (["corpus", "embedding.source"], "corpus and embedding.source differ"),
        (list("abcdef"), "a, b, c, d, e and f differ"),
        (list("abcdefg"), "a, b, c, d, e, f and 1 more differ"),
        (list("abcdefghi"), "a, b, c, d, e, f and 3 more differ"),
        # The top level first, then contenders that the document has figures of.
        (
            ["contenders.ctx.model.interval", "contenders.grid.model.interval", "corpus"],
            "corpus and contenders.ctx.model.interval differ",
        ),
        (["contenders.ctx.training.epochs"], "contenders.ctx.training.epochs differs"),
    ],
)
def test_keys_that_are_not_the_documents(said, keys, differ):
    expected = [f"Not the document's setting: {differ}; {BEYOND}"]
    assert said(departs_from_full=keys) == expected, "at the full scale too"
    assert said(departs_from_full=keys, scale="small") == expected


@pytest.mark.parametrize(
    "keys",
    [
        [],
        ["contenders.grid.model.interval"],  # the document has no figure of it
        ["contenders.ctx-2.model.interval"],  # another contender with the same beginning
    ],
)
@pytest.mark.parametrize("scale", ["full", "next", "layers"])
def test_the_documents_setting_needs_no_note(said, keys, scale):
    assert said(departs_from_full=keys, scale=scale) == []


def test_figures_by_epoch_are_the_documents_too(made, run_of, tmp_path):
    curves = {"val_ppl": [9.0, None]}
    outcomes = [made(baseline=True, scale="full", reported_epochs=curves)]
    run = run_of(outcomes, tmp_path, departs_from_full=["corpus"])
    expected = f"Not the document's setting: corpus differs; {BEYOND}"
    assert notes([run], summarise_runs([run])) == [expected]


def test_without_the_documents_figures_the_scale_is_named(said):
    def of(scale, keys):
        return said(scale=scale, reported=(), departs_from_full=keys)

    assert of("long-512", ["sequence_length"]) == [
        "Measured at scale long-512, not at the recipe's full setting."
    ]
    assert of("fair", []) == [], "only other contenders"
    assert of("full", ["corpus"]) == [], "there is no figure to take it for"


@pytest.mark.parametrize("recipe", [{}, {"departs_from_full": None}])
def test_of_older_runs_only_the_scale_is_known(said, recipe):
    (note,) = said(scale="small", **recipe)
    assert note.startswith(f"{BY_SCALE}small; the document's figures are for its own setting")
    assert said(scale="full", **recipe) == []


@pytest.mark.parametrize("keys", [[], ["corpus"]])
def test_smoke_figures_mean_nothing_at_any_setting(said, keys):
    (note,) = said(scale="smoke", departs_from_full=keys)
    assert note.startswith("Scale smoke only tests that everything runs")


def test_a_note_names_the_contenders_where_it_is_not_about_all(said):
    both = ("ctx", "grid")
    keys = ["contenders.ctx.model.interval"]
    assert said(reported=both, departs_from_full=keys) == [
        f"Not the document's setting (ctx): contenders.ctx.model.interval differs; {BEYOND}"
    ]
    keys = [*keys, "contenders.grid.model.interval"]
    assert said(reported=both, departs_from_full=keys) == [
        "Not the document's setting: contenders.ctx.model.interval and "
        f"contenders.grid.model.interval differ; {BEYOND}"
    ]


def test_each_run_departs_by_itself(said):
    exact = said.build(folder="run-1", departs_from_full=[])
    other = said.build(folder="run-2", departs_from_full=["corpus"])
    third = said.build(folder="run-3", departs_from_full=["corpus"])
    older = said.build(folder="run-4", scale="small")
    text = f"Not the document's setting%s: corpus differs; {BEYOND}"
    assert said(exact) == []
    assert said(exact, other) == [text % " (run-2/ctx)"]
    assert said(other, third) == [text % ""]
    by_scale, by_keys = said(other, exact, older)
    assert by_scale.startswith(f"{BY_SCALE}small; the document's figures")
    assert by_keys == text % " (run-2/ctx)"


def test_the_page_shows_the_note_and_every_key(said, on_disk, tmp_path):
    keys = [f"training.key-{number}" for number in range(8)]
    run = said.build(departs_from_full=keys)
    on_disk(run)
    paths = write_report([read_run(run.folder)], tmp_path / "report")
    text = paths["report.md"].read_text("utf-8")
    assert "training.key-5 and 2 more differ; compare" in text
    assert f"| {', '.join(keys)} |" in text
