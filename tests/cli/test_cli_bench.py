"""`contextlm bench`: every question answers, the last line is JSON, bad usage is told."""

from __future__ import annotations

import json
import math

import pytest

from contextlm.benchmarks import QUESTIONS
from contextlm.cli import app
from contextlm.cli.shell import execute

# One ratio of each question, by the name that users rely on.
NAMES = {
    "scan": "scan_b1_c256_vs_eager",
    "train-step": "train_step_compressed_vs_baseline",
    "context-kv": "context_kv_sublayer_vs_gather",
    "phase1": "phase1_vs_naive",
    "head": "head_frozen_bfloat16_time_vs_plain",
    "decode": "decode_context-vector_vs_post-ln-transformer_at_32",
    "prefill": "prefill_context-pythia_vs_pythia-70m_at_48",
    "stream": "stream_context-token_growth_mb",
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_question_answers(question, tmp_path, capsys):
    plot = tmp_path / "plot.png"
    arguments = ["bench", question, "--smoke", "--repeats", "1", "--plot", str(plot)]
    assert execute(app, arguments) == 0
    *table, last = capsys.readouterr().out.splitlines()
    answer = json.loads(last)
    assert answer["question"] == question
    assert answer["smoke"] is True
    assert NAMES[question] in answer["ratios"]
    assert all(math.isfinite(ratio) for ratio in answer["ratios"].values())
    assert set(answer["targets"]) <= set(answer["ratios"])
    assert answer["rows"]
    shown = "\n".join(table)
    assert all(name in shown for name in answer["ratios"])
    assert "missed" not in shown  # tiny sizes are not judged
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["decod"], "decod"),
        (["scan", "--repeats", "0"], "--repeats"),
        (["scan", "--plot", "nowhere/plot.png"], "--plot"),
        (["scan", "--plot", "plot.pdf"], "--plot"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments, culprit, capsys):
    assert execute(app, ["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert culprit in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.out == ""
