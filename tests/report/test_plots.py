"""The plots: valid pictures of a sensible size whose labels neither overlap nor leave the page."""

from __future__ import annotations

import math
import struct

import pytest
from matplotlib.text import Text

from contextlm.report import plots
from contextlm.report.axes import DPI, WIDTH, perplexity_axis, spread
from contextlm.report.summary import summarise


def size_of(picture):
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", picture[16:24])


def both(rows):
    return plots.curves_figure(rows), plots.frontier_figure(rows)


def contenders(made, number, spacing=0.4):
    names = [f"a-rather-long-contender-name-{i}" if i % 2 else f"short-{i}" for i in range(number)]
    names[-1] = "M" * 64
    return [
        made(name, ppl=100 + spacing * i, baseline=i == 0, cache={128: 2048, 2048: 4096 * (i + 1)})
        for i, name in enumerate(names)
    ]


def test_pictures_are_png_of_a_sensible_size(three_seeds):
    for figure in both(summarise(three_seeds)):
        width, height = size_of(plots.png(figure))
        assert width == round(WIDTH * DPI)
        assert 500 < height < 2000


def test_the_same_rows_give_the_same_bytes(three_seeds):
    rows = summarise(three_seeds)
    assert plots.png(plots.curves_figure(rows)) == plots.png(plots.curves_figure(rows))


@pytest.mark.parametrize("number", [1, 3, 8])
def test_labels_do_not_overlap_and_stay_inside(made, number):
    figure = plots.frontier_figure(summarise(contenders(made, number)))
    plots.png(figure)
    (axes,) = figure.axes
    labels = [text for text in axes.texts if "\n" in text.get_text()]
    assert len(labels) == number
    boxes = [label.get_window_extent() for label in labels]
    page = figure.bbox
    for i, box in enumerate(boxes):
        assert page.x0 <= box.x0
        assert box.x1 <= page.x1
        assert page.y0 <= box.y0
        assert box.y1 <= page.y1
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


@pytest.mark.parametrize("number", [1, 8])
def test_the_legend_of_the_curves_stays_inside(made, number):
    figure = plots.curves_figure(summarise(contenders(made, number)))
    plots.png(figure)
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0
    assert box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0
    assert all(not axes.bbox.overlaps(box) for axes in figure.axes)


def test_edge_cases_draw_without_warnings(made, recwarn):
    cases = {
        "one epoch": [made(epochs=1)],
        "identical": [made(baseline=True), made("same")],
        "no cache": [made(cache={})],
        "nothing kept": [made(cache={128: 0, 2048: 0})],
        "short": [made(baseline=True), made("short", cache={32: 4096})],
        "far apart": [made(baseline=True, ppl=5000), made("good", ppl=20)],
        "uneven seeds": [made(epochs=2), made(seed=1, epochs=5)],
        "not finite": [made(baseline=True), made("broken").model_copy(update={"history": []})],
        "underscore": [made("_hidden")],
        "dollars": [made("$a$_{b}$")],
    }
    for name, outcomes in cases.items():
        for figure in both(summarise(outcomes)):
            assert size_of(plots.png(figure))[0] > 100, name
    assert [str(warning.message) for warning in recwarn] == []


def test_an_infinite_perplexity_is_left_out(made):
    rows = summarise([made(baseline=True), made("broken", validation_ppl=math.inf)])
    figure = plots.frontier_figure(rows)
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert any(text.startswith("mha\n") for text in texts)
    assert not any(text.startswith("broken\n") for text in texts)


@pytest.mark.parametrize("ppl", [9.5, 100.0, 1225.5])
def test_the_frontier_names_the_windows_of_its_perplexity(made, ppl):
    figure = plots.frontier_figure(summarise([made(ppl=ppl), made("b", ppl=1.01 * ppl)]))
    plots.png(figure)
    label = figure.axes[0].yaxis.label
    assert label.get_text() == "validation perplexity\non windows of 128 tokens"
    box = label.get_window_extent()
    assert figure.bbox.x0 <= box.x0
    assert figure.bbox.y0 <= box.y0
    assert box.y1 <= figure.bbox.y1


def test_other_targets_get_a_panel_of_their_own(made):
    rows = summarise([made(baseline=True), made("far", ppl=1200, target_offset=2)])
    figure = plots.frontier_figure(rows)
    assert len(figure.axes) == 2
    assert figure.axes[1].get_title(loc="left").endswith("2 tokens ahead")


def test_the_frontier_is_a_step_line(three_seeds):
    figure = plots.frontier_figure(summarise(three_seeds))
    (step,) = [line for line in figure.axes[0].get_lines() if line.get_drawstyle() == "steps-post"]
    # hybrid beats both others at 2,048 tokens: up from it, and right of it
    assert list(step.get_xdata())[:2] == [262_144, 262_144]
    assert list(step.get_ydata())[1:] == [90.0, 90.0]


def test_best_epochs_are_marked_once_per_seed(three_seeds):
    figure = plots.curves_figure(summarise(three_seeds))
    stars = [line for line in figure.axes[0].get_lines() if line.get_marker() == "*"]
    assert len(stars) == 9
    assert {line.get_xdata()[0] for line in stars} == {3}


def test_wide_perplexities_are_logarithmic(made):
    figure = plots.curves_figure(summarise([made(ppl=20), made("bad", ppl=5000)]))
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "log"]
    narrow = plots.frontier_figure(summarise([made(ppl=20), made("near", ppl=21)]))
    assert narrow.axes[0].get_yscale() == "linear"
    perplexity_axis(narrow.axes[0], [])  # nothing to draw is no error


def test_spread():
    assert spread([0.5], [0.2]) == [0.5]
    assert spread([0.5, 0.5], [0.2, 0.2]) == pytest.approx([0.4, 0.6])
    assert spread([0.0, 1.0], [0.2, 0.2]) == pytest.approx([0.1, 0.9])
    assert spread([0.9, 0.1, 0.9], [0.2, 0.2, 0.2]) == pytest.approx([0.7, 0.1, 0.9])
    assert spread([], []) == []


def test_the_frontier_shows_the_spread_over_seeds(three_seeds, made):
    rows = summarise(three_seeds)
    axes = plots.frontier_figure(rows).axes[0]
    assert len(axes.containers) == len(rows) == 3
    low, high = axes.get_ylim()
    assert low <= min(row.ppl.mean - row.ppl.sd for row in rows)
    assert high >= max(row.ppl.mean + row.ppl.sd for row in rows)
    one_seed = plots.frontier_figure(summarise([made(baseline=True), made("b", ppl=90)]))
    assert one_seed.axes[0].containers == []
