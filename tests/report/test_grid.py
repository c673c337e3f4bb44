"""A grid of settings: its table, its file for programs and its chart."""

from __future__ import annotations

import json
import math

import pytest

from contextlm.report.grid import GridPoint, best_sentences, grid_chart, grid_lines, write_grid

RATE = "training.learning_rate"


@pytest.fixture
def points(made, run_of, tmp_path):
    """Two rates, three seeds of two contenders each; the higher rate breaks one of them."""
    found = []
    for rate, shift in ((1e-3, 0.0), (8e-3, -5.0)):
        outcomes = [
            made(name, seed=seed, ppl=ppl + shift + seed, baseline=name == "mha")
            for name, ppl in (("mha", 100), ("ctx", 90))
            for seed in range(3)
        ]
        found.append(GridPoint({RATE: rate}, run_of(outcomes, tmp_path / f"rate-{rate}")))
    broken = made("late", validation_loss=math.inf, validation_ppl=math.inf)
    found[1].run.outcomes.append(broken)
    return found


def test_the_files(points, tmp_path):
    paths = write_grid(points, tmp_path / "grid")
    assert list(paths) == ["grid.md", "grid.json", "grid.png", "grid.svg", "grid.pdf"]
    text = paths["grid.md"].read_text("utf-8")
    assert text.startswith("| training.learning_rate | contender | validation PPL |")
    assert "| 0.008 | ctx | 86.0 ± 1.0 | -10.4% |" in text
    assert "| 0.008 | late | diverged |" in text
    assert "Holm's correction over 2 comparisons" in text
    assert (
        "- ctx is lowest with training.learning\\_rate 0.008: 86.0 ± 1.0 (3 seeds)"
        in text.replace("learning_rate 0", "learning\\_rate 0")
    )
    rows = json.loads(paths["grid.json"].read_text("utf-8"))["rows"]
    assert [row["setting"] for row in rows] == [{RATE: 1e-3}] * 2 + [{RATE: 8e-3}] * 3
    assert rows[3]["validation_ppl"] == {"mean": 86.0, "sd": 1.0, "seeds": 3}
    assert rows[3]["difference"]["holm"] >= rows[3]["difference"]["p"]
    assert rows[4]["validation_loss"]["mean"] is None
    assert paths["grid.png"].read_bytes().startswith(b"\x89PNG")


def test_the_chart_has_a_point_a_setting_with_its_interval(points):
    caption, chart = grid_chart(grid_lines(points))
    drawn = chart.to_dict(validate=False)
    marks = {layer["mark"]["type"]: layer for layer in drawn["layer"]}
    dots = drawn["datasets"][marks["point"]["data"]["name"]][::-1]
    assert [(dot["x"], dot["label"], dot["y"]) for dot in dots] == [
        ("0.001", "mha (baseline)", 101),
        ("0.001", "ctx", 91),
        ("0.008", "mha (baseline)", 96),
        ("0.008", "ctx", 86),
    ], "the one that diverged has none"
    assert all(dot["low"] < dot["y"] < dot["high"] for dot in dots)
    assert marks["point"]["encoding"]["x"]["title"] == RATE
    assert "95% interval" in caption


def test_of_several_keys_the_first_is_x(points):
    words = [
        GridPoint({"training.schedule": word, RATE: point.values[RATE]}, point.run)
        for word in ("linear", "$cosine$")
        for point in points
    ]
    _, chart = grid_chart(grid_lines(words))
    layer = chart.to_dict(validate=False)["layer"][-1]["encoding"]
    assert layer["x"]["sort"] == ["linear", "$cosine$"]
    assert layer["color"]["legend"]["values"][1] == f"ctx, {RATE} 0.001"


def test_settings_of_other_budgets_are_not_ranked_together(points, made, run_of, tmp_path):
    longer = made().result.corpus.model_copy(update={"train_tokens": 1_024_000})
    run = run_of([made("ctx", ppl=50, baseline=True, corpus=longer)], tmp_path / "longer")
    told = best_sentences(grid_lines([*points, GridPoint({RATE: 4e-3}, run)]))
    assert len(told) == 2
    assert all("512,000 training tokens" in sentence for sentence in told)
    assert "ctx is lowest with training.learning_rate 0.008: 86.0" in told[1]


def test_a_grid_of_which_nothing_finished(run_of, tmp_path):
    paths = write_grid([GridPoint({RATE: 1.0}, run_of([], tmp_path / "run"))], tmp_path / "grid")
    assert json.loads(paths["grid.json"].read_text("utf-8")) == {"rows": [], "best": []}
