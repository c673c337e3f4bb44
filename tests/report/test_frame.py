"""The frame of all seeds, and the file made of it."""

from __future__ import annotations

import math
import re

import pandas as pd

from contextlm.report.frame import csv_frame, seed_frame
from contextlm.results.facts import RetrievalAccuracy


def test_a_row_a_contender_and_seed(run):
    frame = seed_frame([run])
    assert len(frame) == 9
    assert list(frame.contender[:3]) == ["mha", "hybrid", "compressed"]
    hybrid = frame[(frame.contender == "hybrid") & (frame.seed == 1)].iloc[0]
    assert hybrid.run == "run-1"
    assert hybrid.validation_ppl == 90.0
    assert hybrid.cache_bytes_128 == 65_536
    assert hybrid.cache_resident_128 == 131_072
    assert (hybrid.phase1_iterations, hybrid.context_dim) == (14, 500)
    assert hybrid.decode_rate == 40.0
    mha = frame[frame.contender == "mha"].iloc[0]
    assert mha.reported_val_ppl == 471.3
    assert pd.isna(mha.phase1_iterations)


def test_a_document_figure_has_one_name(made, run_of, tmp_path):
    reported = {"validation_ppl": 9.0, "parameters_total": 7}
    frame = seed_frame([run_of([made(reported=reported)], tmp_path)])
    assert frame.reported_val_ppl[0] == 9
    assert frame.reported_parameters[0] == 7


def test_diverged_is_said_and_kept(made, run_of, tmp_path):
    seeds = [
        made(seed=seed, validation_loss=loss, validation_ppl=math.inf if loss > 700 else 9.0)
        for seed, loss in enumerate((4.0, 80.0, math.inf, math.nan))
    ]
    frame = seed_frame([run_of(seeds, tmp_path)])
    assert list(frame.diverged) == [False, True, True, True]
    assert math.isinf(frame.validation_loss[2])


def test_what_is_kept_holds_no_speeds(made, run_of, tmp_path):
    answers = [RetrievalAccuracy(level="4 pairs", accuracy=0.5, answers=10)]
    runs = [
        run_of([made(retrieval=answers), made("ctx", phase1=True)], tmp_path / "a"),
        run_of([made(cache={2048: 7})], tmp_path / "b"),
    ]
    kept = csv_frame(seed_frame(runs))
    assert [n for n in kept if re.search("rate|seconds|peak|speed", n)] == []
    assert list(kept.run) == ["a", "a", "b"]
    assert list(kept.answers_4_pairs.dropna()) == [0.5]
    assert kept.cache_bytes_2048[2] == 7
