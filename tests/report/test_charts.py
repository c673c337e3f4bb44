"""The charts: valid pictures of whatever a result may hold, with nothing outside the page."""

from __future__ import annotations

import math
import struct

import pandas as pd
import pytest

from contextlm.report import charts
from contextlm.report.contenders import contenders
from contextlm.results.result import StepRow


@pytest.fixture
def rows_of(run_of, tmp_path):
    """The rows of one run of these outcomes."""
    return lambda *outcomes: contenders([run_of(list(outcomes), tmp_path / "run")])


def size_of(picture):
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", picture[16:24])


def both(rows):
    return charts.curves_figure(rows), charts.frontier_figure(rows)


def test_the_same_rows_give_the_same_picture(run):
    rows = contenders([run])
    for first, second in zip(both(rows), both(rows), strict=True):
        picture = charts.png(first)
        width, height = size_of(picture)
        assert width == round(charts.WIDTH * charts.DPI)
        assert 500 < height < 2000
        assert charts.png(second) == picture


@pytest.mark.parametrize("number", [1, 8])
def test_legends_stay_inside_and_off_the_axes(made, rows_of, number):
    names = [f"a-rather-long-contender-name-{i}" for i in range(number - 1)] + ["M" * 64]
    rows = rows_of(*(made(name, baseline=not i) for i, name in enumerate(names)))
    for figure in both(rows):
        charts.png(figure)
        legends = [*figure.legends, *(one for sub in figure.subfigs for one in sub.legends)]
        assert legends
        for box in (legend.get_window_extent() for legend in legends):
            assert figure.bbox.y0 - 1 <= box.y0
            assert box.y1 <= figure.bbox.y1
            assert all(not axes.bbox.overlaps(box) for axes in figure.axes)


def test_whatever_a_result_may_hold_is_drawn(made, rows_of, recwarn):
    capped = {"validation_loss": 200.0, "validation_ppl": math.exp(200)}
    cases = {
        "one epoch": [made(epochs=1)],
        "identical": [made(baseline=True), made("same")],
        "no cache": [made(cache={})],
        "nothing kept": [made(cache={128: 0, 2048: 0})],
        "short": [made(baseline=True), made("short", cache={32: 4096})],
        "far apart": [made(baseline=True, ppl=5000), made("good", ppl=20)],
        "up to the cap": [made(baseline=True), made("b", ppl=1e34)],
        "diverged": [made(baseline=True, ppl=math.exp(200)), made("b", **capped)],
        "half diverged": [made(baseline=True), made("b"), made("b", seed=1, **capped)],
        "all diverged": [made(baseline=True, validation_loss=math.nan)],
        "uneven seeds": [made(epochs=2), made(seed=1, epochs=5)],
        "not finite": [made(baseline=True, validation_ppl=math.inf)],
        "no history": [made(baseline=True).model_copy(update={"history": []})],
        "underscore": [made("_hidden")],
        "dollars": [made("$a$_{b}$")],
        "other target": [made(baseline=True), made("far", target_offset=2)],
    }
    for name, outcomes in cases.items():
        for figure in both(rows_of(*outcomes)):
            assert size_of(charts.png(figure))[0] > 100, name
    assert [str(warning.message) for warning in recwarn] == []


def test_a_diverged_contender_has_no_point_and_is_named(made, rows_of):
    rows = rows_of(made(baseline=True), made("broken", validation_loss=90.0))
    (panel,) = charts.frontier_figure(rows).subfigs
    texts = [text.get_text() for text in panel.legends[0].get_texts()]
    assert texts == ["mha: 100.0, 128.0 KB", "broken: diverged, 128.0 KB"]
    assert {line.get_color() for line in panel.axes[0].get_lines()} == {"#222222", "#888888"}


@pytest.mark.parametrize("ppl", [9.5, 100.0, 1225.5])
def test_the_frontier_names_the_windows_of_its_perplexity(made, rows_of, ppl):
    figure = charts.frontier_figure(rows_of(made(ppl=ppl), made("b", ppl=1.01 * ppl)))
    charts.png(figure)
    label = figure.axes[0].yaxis.label
    assert label.get_text() == "validation perplexity\non windows of 128 tokens"
    box = label.get_window_extent()
    assert figure.bbox.x0 <= box.x0
    assert figure.bbox.y0 <= box.y0
    assert box.y1 <= figure.bbox.y1


def test_other_targets_get_a_panel_of_their_own(made, rows_of):
    rows = rows_of(made(baseline=True), made("far", ppl=1200, target_offset=2))
    figure = charts.frontier_figure(rows)
    assert len(figure.axes) == 2
    assert figure.axes[1].get_title(loc="left").endswith("2 tokens ahead")


def test_the_frontier_is_a_step_line_with_bars(run):
    axes = charts.frontier_figure(contenders([run])).axes[0]
    (step,) = [line for line in axes.get_lines() if line.get_drawstyle() == "steps-post"]
    # at 128 tokens hybrid and compressed keep the same, and hybrid is lower
    assert list(step.get_xdata())[:2] == [65_536, 65_536]
    assert list(step.get_ydata())[1:] == [90.0, 90.0]
    assert len(axes.containers) == 3
    assert axes.get_ylim()[0] <= 89
    assert axes.get_ylim()[1] >= 111


def test_points_that_no_other_beats():
    points = pd.DataFrame(
        [(1.0, 9.0), (2.0, 5.0), (3.0, 6.0), (2.0, 7.0), (4.0, 5.0), (5.0, 1.0), (5.0, 1.0)],
        columns=["size", "ppl"],
    )
    assert charts.pareto(points).to_numpy().tolist() == [[1, 9], [2, 5], [5, 1]]
    assert charts.pareto(points[:0]).empty


def test_epochs_stand_at_the_tokens_trained_on_with_stars_at_the_best(run):
    axes = charts.curves_figure(contenders([run])).axes[0]
    stars = [line for line in axes.get_lines() if line.get_marker() == "*"]
    assert len(stars) == 9, "one a seed"
    assert {line.get_xdata()[0] for line in stars} == {3 * 4000 * 128}


def test_a_run_of_one_epoch_draws_a_line_by_step(made, rows_of):
    one = made(epochs=1)
    steps = [
        StepRow(step=n, epoch=1, loss=6.0 - n / 100, learning_rate=1e-3) for n in range(1, 101)
    ]
    (row,) = rows_of(one.model_copy(update={"history": [*steps, *one.history]}))
    top, bottom = charts.curves_figure([row]).axes
    line = max(top.get_lines(), key=lambda line: len(line.get_xdata()))
    assert len(line.get_xdata()) == 100
    assert line.get_xdata()[-1] == 4000 * 128
    assert line.get_ydata()[-1] == pytest.approx(5.0)
    below = max(bottom.get_lines(), key=lambda line: len(line.get_xdata()))
    assert below.get_ydata()[-1] == pytest.approx(math.exp(5.0))


def test_wide_perplexities_are_logarithmic(made, rows_of):
    figure = charts.curves_figure(rows_of(made(ppl=20), made("bad", ppl=5000)))
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "log"]
    narrow = charts.frontier_figure(rows_of(made(ppl=20), made("near", ppl=21)))
    assert narrow.axes[0].get_yscale() == "linear"
    charts.perplexity_axis(narrow.axes[0], [])  # nothing to draw is no error
