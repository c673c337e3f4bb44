"""The phase-1 question: a table for people, a JSON line for programs, one line for an error."""

from __future__ import annotations

import json
import sys

import pytest

from contextlm.benchmarks import phase1_convergence
from contextlm.recipe.settings import PhaseOneSettings


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    """Call `main` with some arguments on a small text; one short case instead of three."""
    text = tmp_path / "texts"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"Page {number} tells of {number * number} words. " * 9)
    monkeypatch.setenv("CONTEXTLM_CACHE", str(tmp_path / "cache"))
    case = ("context_kv", PhaseOneSettings(max_iterations=3), 18)
    monkeypatch.setattr(phase1_convergence, "CASES", (case,))

    def call(*more: str):
        arguments = ["phase1", f"text:{text}", "--tokenizer", "bpe:300", "--device", "cpu", *more]
        monkeypatch.setattr(sys, "argv", arguments)
        phase1_convergence.main()
        return capsys.readouterr()

    return call


def test_ends_with_one_json_line(ask):
    out = ask("--tokens", "500").out
    answer = json.loads(out.splitlines()[-1])
    (row,) = answer["rows"]
    assert (row["model"], row["context_dim"], row["iterations"]) == ("context_kv", 256, 3)
    assert row["iterations_reported"] == 18
    assert 0 <= row["converged"] <= 1
    assert 0 < row["effective_rank"] <= 1
    assert "context_kv" in out.splitlines()[-2]


def test_too_little_text_is_one_line(ask, capsys):
    with pytest.raises(SystemExit) as stopped:
        ask("--tokens", "100000000")
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--tokens: 100000000 asked for" in line
