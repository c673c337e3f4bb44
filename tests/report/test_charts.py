"""The charts: what they draw of whatever a result may hold."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pandas as pd
import pytest

from contextlm.report import charts
from contextlm.report.contenders import contenders
from contextlm.report.numbers import ABSENT
from contextlm.results.facts import PositionLoss, RetrievalAccuracy
from contextlm.results.result import StepRow

CAPPED = {"validation_loss": 200.0, "validation_ppl": math.exp(200)}


def drawn(rows):
    """The charts by name."""
    return {figure.name: figure for figure in charts.figures(rows)}


def data(figure, layer):
    """The rows that a layer draws; where all layers draw the same, they stand above."""
    return figure.chart["datasets"][layer.get("data", figure.chart.get("data"))["name"]]


def values(figure, *, mark):
    """The rows of the layers that draw with one kind of mark."""
    layers = [layer for layer in figure.chart["layer"] if layer["mark"]["type"] == mark]
    return [row for layer in layers for row in data(figure, layer)]


def encoding(figure):
    """How the points are drawn."""
    (layer,) = [one for one in figure.chart["layer"] if one["mark"]["type"] == "point"]
    return layer["encoding"]


def asked(made, name, shares, **changes):
    levels = [
        RetrievalAccuracy(level=f"{n} pairs", accuracy=s, answers=9)
        for n, s in zip((2, 4), shares, strict=True)
    ]
    mean = sum(shares) / 2
    return made(name, retrieval=levels, accuracy=mean, **changes)


def test_the_files_are_the_same_each_time(run, tmp_path):
    for folder in ("one", "two"):
        drawn(contenders([run]))["frontier"].save(tmp_path / folder)
    one, two = (sorted((tmp_path / folder).iterdir()) for folder in ("one", "two"))
    starts = [b"%PDF", b"\x89PNG", b"<svg"]
    assert [file.name for file in one] == ["frontier.pdf", "frontier.png", "frontier.svg"]
    for start, first, second in zip(starts, one, two, strict=True):
        assert first.read_bytes().startswith(start)
        if first.suffix != ".pdf":  # it names its fonts anew each time
            assert first.read_bytes() == second.read_bytes()


def test_whatever_a_result_may_hold_is_drawn(made, rows_of, recwarn):
    once = made(baseline=True)
    twice = once.model_copy(update={"history": [*once.history, *once.history]})
    cases = {
        "one epoch": [made(epochs=1)],
        "identical": [made(baseline=True), made("same")],
        "no cache": [made(cache={})],
        "nothing kept": [made(cache={128: 0, 2048: 0})],
        "far apart": [made(baseline=True), made("b", ppl=1e34)],
        "half diverged": [made(baseline=True), made("b"), made("b", seed=1, **CAPPED)],
        "all diverged": [made(baseline=True, validation_loss=math.nan)],
        "uneven seeds": [made(epochs=2), made(seed=1, epochs=5)],
        "not finite": [made(baseline=True, validation_ppl=math.inf)],
        "an epoch twice": [twice],
        "no history": [made(baseline=True).model_copy(update={"history": []})],
        "markup": [made("<b>&{0}$")],
        "other target": [made(baseline=True), made("far", target_offset=2)],
    }
    for name, outcomes in cases.items():
        for figure in charts.figures(rows_of(*outcomes)):
            assert figure.svg.startswith("<svg"), name
            assert "<b>" not in figure.svg
    assert [str(warning.message) for warning in recwarn] == []


def test_the_frontier_is_drawn_at_the_windows_length_alone(run):
    figure = drawn(contenders([run]))["frontier"]
    points = {point["label"]: point for point in values(figure, mark="point")}
    assert list(points)[::-1] == ["1 hybrid", "2 mha (baseline)", "3 compressed"]
    assert points["1 hybrid"]["x"] == 65_536
    assert points["1 hybrid"]["shown"] == "90.0 ± 1.0"
    assert points["1 hybrid"]["low"] == pytest.approx(90 - 4.302653 / math.sqrt(3))
    assert points["2 mha (baseline)"]["versus"] == ABSENT
    assert re.match(r"-10\.0% · lower · -1\d", points["1 hybrid"]["versus"])
    # At 128 tokens hybrid and compressed keep the same, and hybrid is lower.
    step = data(figure, figure.chart["layer"][0])
    assert [(point["x"], point["y"]) for point in step] == [(65_536, 90), (131_072 * 1.6, 90)]
    assert "both at 128 tokens" in figure.caption


def test_without_a_cache_at_that_length_there_is_no_frontier(made, rows_of):
    assert "frontier" not in drawn(rows_of(made(baseline=True, cache={512: 9})))


def test_a_diverged_contender_has_no_point_and_other_targets_their_own_chart(made, rows_of):
    broken = made("broken", validation_loss=90.0)
    found = drawn(rows_of(made(baseline=True), broken, made("far", target_offset=2)))
    assert [p["label"] for p in values(found["frontier"], mark="point")] == ["1 mha (baseline)"]
    assert "2 tokens ahead: Perplexity and cache" in found["frontier-2"].caption


def test_a_task_is_drawn_by_right_answers(made, rows_of):
    """The recall report once put a model with 27 % right answers on the frontier."""
    rows = rows_of(
        asked(made, "mha", (1.0, 0.8), baseline=True, ppl=5.0),
        asked(made, "ctx", (0.4, 0.2), ppl=2.0, cache={128: 1000}),
    )
    found = drawn(rows)
    points = {p["label"]: p["y"] for p in values(found["frontier"], mark="point")}
    assert points == {"1 mha (baseline)": pytest.approx(90), "2 ctx": pytest.approx(30)}
    assert "Right answers against cache at 128 tokens" in found["frontier"].caption
    by_level = [p for p in values(found["retrieval"], mark="point") if p["label"] == "2 ctx"]
    assert [(p["x"], round(p["y"])) for p in by_level[::-1]] == [("2 pairs", 40), ("4 pairs", 20)]


def test_points_that_no_other_beats():
    points = pd.DataFrame(
        [(1.0, 9.0), (2.0, 5.0), (3.0, 6.0), (2.0, 7.0), (4.0, 5.0), (5.0, 1.0), (5.0, 1.0)],
        columns=["x", "cost"],
    )
    assert charts.pareto(points).to_numpy().tolist() == [[1, 9], [2, 5], [5, 1]]
    assert charts.pareto(points[:0]).empty


def test_perplexity_against_tokens_with_intervals(made, run_of, tmp_path):
    runs = []
    for tokens in (256_000, 512_000):
        corpus = made().result.corpus.model_copy(update={"train_tokens": tokens})
        outcomes = [
            made(
                name,
                seed=seed,
                ppl=ppl * 1e5 / tokens + seed,
                baseline=name == "mha",
                corpus=corpus,
            )
            for name, ppl in (("mha", 100), ("ctx", 90))
            for seed in range(3)
        ]
        runs.append(run_of(outcomes, tmp_path / str(tokens), training={"epochs": 2}))
    assert "budgets" not in drawn(contenders(runs[:1]))
    found = drawn(contenders(runs))
    points = values(found["budgets"], mark="point")[::-1]
    assert [(p["label"], p["x"]) for p in points] == [
        ("2 mha (baseline)", 512_000),
        ("1 ctx", 512_000),
        ("2 mha (baseline)", 1_024_000),
        ("1 ctx", 1_024_000),
    ]
    assert all(p["low"] < p["y"] < p["high"] for p in points)
    assert {"frontier", "frontier-2", "curves"} <= set(found), "a frontier a budget"


def test_longer_texts_have_a_frontier_and_a_curve_by_position(made, rows_of):
    def scored(ppl, *, most):
        edges = [0, 128, 512, 2048][: most + 1]
        return [
            PositionLoss(first=a, last=b, tokens=b - a, loss=math.log(ppl), ppl=ppl)
            for a, b in pairwise(edges)
        ]

    rows = rows_of(
        made(baseline=True, positions=scored(50, most=2)),
        made("ctx", positions=scored(40, most=3), cache={128: 9, 512: 99, 2048: 999}),
    )
    found = drawn(rows)
    points = {p["label"]: (p["x"], p["y"]) for p in values(found["frontier-long"], mark="point")}
    assert points["2 ctx"] == (99, pytest.approx(40)), "2,048 tokens were scored of one alone"
    ends = {(p["label"], p["x"]) for p in values(found["positions"], mark="point")}
    assert ("2 ctx", 2048) in ends
    assert ("1 mha (baseline)", 2048) not in ends


def test_curves_are_means_at_the_tokens_trained_on(made, rows_of):
    rows = rows_of(made(epochs=2), made(seed=1, epochs=5), made("b", seed=1, **CAPPED))
    points = values(drawn(rows)["curves"], mark="point")[::-1]
    mine = [point for point in points if point["label"] == "1 mha"]
    assert [point["x"] for point in mine] == [512_000, 1_024_000], "as far as both seeds went"
    # Two epochs of 100 (best) and 102, five of 250 and 200 to begin with.
    expected = [math.log(100 * 250) / 2, math.log(102 * 200) / 2]
    assert [point["y"] for point in mine] == pytest.approx(expected)


def test_a_long_training_is_drawn_in_few_points(made, rows_of):
    one = made(epochs=1)
    steps = [
        StepRow(step=n, epoch=1, loss=6.0 - n / 1000, learning_rate=1e-3) for n in range(1, 1001)
    ]
    rows = rows_of(one.model_copy(update={"history": [*steps, *one.history]}))
    figure = drawn(rows)["curves"]
    line = data(figure, figure.chart["layer"][0])
    assert 100 < len(line) <= charts.MOST_POINTS
    assert line[0]["y"] == pytest.approx(5.995), "the mean of the first nine steps"


def test_with_many_contenders_a_chart_stays_readable(made, rows_of):
    names = [f"{'a-rather-long-contender-name-' * 2}{i:02}" for i in range(35)]
    rows = rows_of(
        *(made(name, ppl=100 + i) for i, name in enumerate(names)), made(baseline=True, ppl=200)
    )
    figure = drawn(rows)["frontier"]
    labels = encoding(figure)["color"]["legend"]["values"]
    assert len(labels) == len(set(labels)) == 36
    assert max(map(len, labels)) < 35
    assert [label.split()[0] for label in labels] == [str(n) for n in range(1, 37)]
    domain = encoding(figure)["color"]["scale"]["domain"]
    assert "36 mha (baseline)" in domain[:8], "the baseline has a colour"
    assert figure.chart["height"] > charts.HEIGHT


@pytest.mark.parametrize(("ppl", "scale"), [(21, None), (5000, "log"), (1e9, "log")])
def test_wide_perplexities_are_logarithmic(made, rows_of, ppl, scale):
    figure = drawn(rows_of(made(ppl=20), made("other", ppl=ppl)))["frontier"]
    axis = encoding(figure)["y"]
    assert axis["scale"].get("type") == scale
    assert scale is None or 2 <= len(axis["axis"]["values"]) <= 15
