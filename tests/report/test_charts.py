"""The charts: valid pictures of whatever a result may hold, with nothing outside the page."""

from __future__ import annotations

import math
import struct

import pandas as pd
import pytest

from contextlm.report import charts
from contextlm.report.contenders import contenders
from contextlm.results.result import StepRow

CAPPED = {"validation_loss": 200.0, "validation_ppl": math.exp(200)}


def size_of(picture):
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", picture[16:24])


def both(rows):
    return charts.curves_figure(rows), charts.frontier_figure(rows)


def labelled(axes):
    return {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}


def test_the_same_rows_give_the_same_picture(run):
    rows = contenders([run])
    for first, second in zip(both(rows), both(rows), strict=True):
        picture = charts.png(first)
        width, height = size_of(picture)
        assert width == round(charts.WIDTH * 160)
        assert 500 < height < 2000
        assert charts.png(second) == picture


@pytest.mark.parametrize("number", [1, 20])
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
    once = made(baseline=True)
    twice = once.model_copy(update={"history": [*once.history, *once.history]})
    cases = {
        "one epoch": [made(epochs=1)],
        "identical": [made(baseline=True), made("same")],
        "no cache": [made(cache={})],
        "nothing kept": [made(cache={128: 0, 2048: 0})],
        "short": [made(baseline=True), made("short", cache={32: 4096})],
        "far apart": [made(baseline=True), made("b", ppl=1e34)],
        "half diverged": [made(baseline=True), made("b"), made("b", seed=1, **CAPPED)],
        "all diverged": [made(baseline=True, validation_loss=math.nan)],
        "uneven seeds": [made(epochs=2), made(seed=1, epochs=5)],
        "not finite": [made(baseline=True, validation_ppl=math.inf)],
        "an epoch twice": [twice],
        "no history": [made(baseline=True).model_copy(update={"history": []})],
        "dollars": [made("$a$_{b}$")],
        "other target": [made(baseline=True), made("far", target_offset=2)],
    }
    for name, outcomes in cases.items():
        for figure in both(rows_of(*outcomes)):
            assert size_of(charts.png(figure))[0] > 100, name
    assert [str(warning.message) for warning in recwarn] == []


def test_a_diverged_contender_has_no_point_and_is_named(made, rows_of):
    rows = rows_of(made(baseline=True), made("broken", validation_loss=90.0))
    points = labelled(charts.frontier_figure(rows).axes[0])
    assert list(points) == ["mha: 100.0", "broken: diverged"]
    assert [len(point[0].get_xdata()) for point in points.values()] == [1, 0]


def test_other_targets_get_a_panel_of_their_own(made, rows_of):
    rows = rows_of(made(baseline=True), made("far", ppl=1200, target_offset=2))
    first, second = charts.frontier_figure(rows).axes
    assert first.get_ylabel().endswith("on windows of 128 tokens")
    assert "2 tokens ahead" in second.get_title(loc="left")


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


def test_curves_are_means_at_the_tokens_trained_on(made, rows_of):
    rows = rows_of(made(epochs=2), made(seed=1, epochs=5), made("b", seed=1, **CAPPED))
    axes = charts.curves_figure(rows).axes[0]
    line = labelled(axes)["mha"]
    assert line.get_xdata().tolist() == [4000 * 128, 2 * 4000 * 128], "as far as both seeds went"
    # Two epochs of 100 (best) and 102, five of 250 and 200 to begin with.
    expected = [math.log(100 * 250) / 2, math.log(102 * 200) / 2]
    assert line.get_ydata() == pytest.approx(expected)


def test_a_run_of_one_epoch_draws_a_line_by_step(made, rows_of):
    one = made(epochs=1)
    steps = [
        StepRow(step=n, epoch=1, loss=6.0 - n / 100, learning_rate=1e-3) for n in range(1, 101)
    ]
    (row,) = rows_of(one.model_copy(update={"history": [*steps, *one.history]}))
    line = max(charts.curves_figure([row]).axes[0].get_lines(), key=lambda x: len(x.get_xdata()))
    assert len(line.get_xdata()) == 100
    assert line.get_xdata()[-1] == 4000 * 128
    assert line.get_ydata()[-1] == pytest.approx(5.0)


@pytest.mark.parametrize(("ppl", "scale"), [(21, "linear"), (5000, "log"), (1e9, "log")])
def test_wide_perplexities_are_logarithmic(made, rows_of, ppl, scale):
    figure = charts.frontier_figure(rows_of(made(ppl=20), made("other", ppl=ppl)))
    charts.png(figure)
    axes = figure.axes[0]
    assert axes.get_yscale() == scale
    low, high = axes.get_ylim()
    labels = [t.get_text() for t in axes.get_yticklabels() if low <= t.get_position()[1] <= high]
    assert 2 <= len(set(labels)) == len(labels) <= 12
